//! TLS of the data plane: NAR bytes between members, encrypted, with the node's own identity on both ends.
//!
//! TLS 1.3 with the certificates of libp2p (specs, tls/tls.md): self-signed, and in an extension the ed25519 identity
//! key with its signature over the certificate's key. Both sides present one; there is no authority and no host name.
//! The session proves *who*; whether that peer may come in is the caller's answer, asked before the first byte of
//! the application: [`Acceptor::accept`] closes on strangers, [`Connector::connect`] on anybody but the expected peer.
//!
//! AES-128-GCM is preferred: with AES instructions it moves 800 MiB/s where libp2p's own order (ChaCha20 first)
//! moves 620 (DESIGN.md §2).
//!
//! Invariants: no session is resumed, so every connection proves both identities anew and a revoked peer cannot come
//! back on an old ticket; no early data; a peer that stalls is dropped at the handshake deadline; the crypto provider
//! is passed explicitly, never the process default.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId;
use libp2p_tls::certificate;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme,
};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{client, server};

use crate::identity::Identity;

/// The only protocol: HTTP/1.1 as this version of Granary speaks it.
pub const ALPN: &[u8] = b"granary/1";

/// The same for whoever is not admitted, to nodes that share in public.
pub const PUBLIC_ALPN: &[u8] = b"granary-public/1";

/// What a machine speaks that wants to be admitted, to the holder of the mesh key.
pub const JOINING_ALPN: &[u8] = b"granary-join/1";

/// Both round trips and both signatures, on a loaded machine behind bad Wi-Fi.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// A certificate is a few hundred bytes; parsing anything much longer is work for a stranger.
const CERTIFICATE_BYTES_MAX: usize = 4096;

/// Signatures that a peer's certificate key may make. libp2p makes ECDSA P-256; the others are what its
/// implementations in other languages use. No RSA.
const SCHEMES: [SignatureScheme; 3] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
];

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot connect to {address}: {source}")]
    Connect {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("TLS handshake with {address} failed: {source}")]
    Handshake {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("TLS handshake with {address} did not end within {after:?}")]
    TimedOut {
        address: SocketAddr,
        after: Duration,
    },
    #[error("{peer} at {address} is not admitted, closed the connection")]
    NotAdmitted { peer: PeerId, address: SocketAddr },
    #[error("{found} answered at {address} where {expected} was expected, closed the connection")]
    WrongPeer {
        found: PeerId,
        expected: PeerId,
        address: SocketAddr,
    },
    #[error("{address} did not agree on a protocol, closed the connection")]
    WrongProtocol { address: SocketAddr },
    #[error("the connection ended before the handshake: {0}")]
    Gone(#[source] io::Error),
}

/// Why this node cannot speak TLS at all.
#[derive(Debug, thiserror::Error)]
pub enum TlsSetupError {
    #[error("cannot make a certificate for the identity key: {0}")]
    Certificate(#[from] certificate::GenError),
    #[error("cannot set up TLS 1.3: {0}")]
    Config(#[from] rustls::Error),
}

/// Takes connections of members, and of those who want to become one.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    deadline: Duration,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// HTTP, for a peer that is admitted.
    Transfer,
    /// HTTP, for whoever it is.
    Public,
    /// To be admitted.
    Joining,
}

/// Makes an acceptor with a fresh certificate. Where the mesh key is, `mesh` is its identity, which is shown
/// to those who want to join.
///
/// The certificate does not expire in the lifetime of a process (libp2p makes them valid from 1975 to 4096), and peers
/// look at the key in it, not at its dates.
pub fn acceptor(
    identity: &Identity,
    mesh: Option<&Identity>,
    deadline: Duration,
) -> Result<Acceptor, TlsSetupError> {
    let certificates = OwnCertificates {
        own: certificate_of(identity)?.0,
        mesh: mesh
            .map(certificate_of)
            .transpose()?
            .map(|certificate| certificate.0),
    };
    let mut protocols = vec![ALPN.to_vec()];
    if mesh.is_some() {
        protocols.push(JOINING_ALPN.to_vec());
    }
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyPeer))
        .with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = protocols;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Acceptor {
        config: Arc::new(config),
        deadline,
    })
}

impl Acceptor {
    /// Takes connections of strangers as well, for what is shared in public.
    pub fn open_to_strangers(&mut self) {
        let config = Arc::make_mut(&mut self.config);
        config.alpn_protocols.push(PUBLIC_ALPN.to_vec());
    }

    /// Completes the handshake and returns who is there.
    ///
    /// `is_admitted` is asked once, right after the handshake, of who wants transfers; a peer that it refuses is told
    /// by a TLS close and hears no byte of the application. Sets TCP_NODELAY. Not cancel-safe: dropping it drops the connection.
    pub async fn accept(
        &self,
        socket: TcpStream,
        is_admitted: impl Fn(&PeerId) -> bool,
    ) -> Result<(server::TlsStream<TcpStream>, PeerId, Purpose), TlsError> {
        let address = socket.peer_addr().map_err(TlsError::Gone)?;
        socket.set_nodelay(true).map_err(TlsError::Gone)?;
        let after = self.deadline;
        let tls = tokio_rustls::TlsAcceptor::from(self.config.clone());
        let mut stream = timeout(after, tls.accept(socket))
            .await
            .map_err(|_| TlsError::TimedOut { address, after })?
            .map_err(|source| TlsError::Handshake { address, source })?;
        let session = stream.get_ref().1;
        let purpose = match session.alpn_protocol() {
            Some(ALPN) => Some(Purpose::Transfer),
            // Agreed upon only where this node shares in public.
            Some(PUBLIC_ALPN) => Some(Purpose::Public),
            // Agreed upon only where the mesh key is.
            Some(JOINING_ALPN) => Some(Purpose::Joining),
            _ => None,
        };
        let peer = session.peer_certificates().and_then(peer_of);
        match (peer, purpose) {
            (Some(peer), Some(purpose @ (Purpose::Joining | Purpose::Public))) => {
                Ok((stream, peer, purpose))
            }
            (Some(peer), Some(purpose)) if is_admitted(&peer) => Ok((stream, peer, purpose)),
            (peer, purpose) => {
                // A stranger that does not take the close is dropped; it gets no second deadline.
                let _ = timeout(after, stream.shutdown()).await;
                Err(match peer {
                    Some(peer) if purpose.is_some() => TlsError::NotAdmitted { peer, address },
                    // rustls refuses clients that offer only other protocols, and lets pass those that offer none.
                    _ => TlsError::WrongProtocol { address },
                })
            }
        }
    }
}

/// Connects to members, or to who admits.
#[derive(Clone)]
pub struct Connector {
    tls: tokio_rustls::TlsConnector,
    protocol: &'static [u8],
    deadline: Duration,
}

/// Makes a connector with a fresh certificate; see [`acceptor`] on its lifetime.
pub fn connector(identity: &Identity, deadline: Duration) -> Result<Connector, TlsSetupError> {
    connector_for(ALPN, identity, deadline)
}

/// Makes a connector with which a stranger asks a node that shares in public.
pub fn stranger(identity: &Identity, deadline: Duration) -> Result<Connector, TlsSetupError> {
    connector_for(PUBLIC_ALPN, identity, deadline)
}

/// Makes a connector with which to join: to be told the mesh key's peer id as the one to expect.
pub fn newcomer(identity: &Identity, deadline: Duration) -> Result<Connector, TlsSetupError> {
    connector_for(JOINING_ALPN, identity, deadline)
}

fn connector_for(
    protocol: &'static [u8],
    identity: &Identity,
    deadline: Duration,
) -> Result<Connector, TlsSetupError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyPeer))
        .with_client_cert_resolver(Arc::new(certificate_of(identity)?));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    // There is no host name, and the identity of the server would be none of an observer's business.
    config.enable_sni = false;
    Ok(Connector {
        tls: Arc::new(config).into(),
        protocol,
        deadline,
    })
}

impl Connector {
    /// Connects and makes sure that `expected` is at the other end.
    ///
    /// The deadline covers TCP and TLS together. The server may still refuse us after its side of the handshake:
    /// then the first read ends. Sets TCP_NODELAY. Not cancel-safe: dropping it drops the connection.
    pub async fn connect(
        &self,
        address: SocketAddr,
        expected: PeerId,
    ) -> Result<client::TlsStream<TcpStream>, TlsError> {
        let after = self.deadline;
        timeout(after, self.connect_unbounded(address, expected))
            .await
            .unwrap_or(Err(TlsError::TimedOut { address, after }))
    }

    async fn connect_unbounded(
        &self,
        address: SocketAddr,
        expected: PeerId,
    ) -> Result<client::TlsStream<TcpStream>, TlsError> {
        let connect_error = |source| TlsError::Connect { address, source };
        let socket = TcpStream::connect(address).await.map_err(connect_error)?;
        socket.set_nodelay(true).map_err(connect_error)?;
        let name = ServerName::from(address.ip());
        let mut stream = self
            .tls
            .connect(name, socket)
            .await
            .map_err(|source| TlsError::Handshake { address, source })?;
        let session = stream.get_ref().1;
        let agreed = session.alpn_protocol() == Some(self.protocol);
        let error = match session.peer_certificates().and_then(peer_of) {
            Some(found) if agreed && found == expected => return Ok(stream),
            Some(found) if agreed => TlsError::WrongPeer {
                found,
                expected,
                address,
            },
            _ => TlsError::WrongProtocol { address },
        };
        let _ = stream.shutdown().await;
        Err(error)
    }
}

/// Gathers the randomness from which the library draws for as long as the process lives: some 40 ms of computing,
/// which else the first handshake does on the reactor, while everything waits.
///
/// What fails here fails in every handshake, and is said there.
pub fn gather_randomness() {
    let _ = provider().secure_random.fill(&mut [0]);
}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

/// The certificate that this node shows, whoever asks.
///
/// A resolver, because rustls refuses a certificate with a critical extension of libp2p's kind in `with_single_cert`.
#[derive(Debug)]
struct OwnCertificate(Arc<CertifiedKey>);

fn certificate_of(identity: &Identity) -> Result<OwnCertificate, TlsSetupError> {
    let (certificate, key) = certificate::generate(&identity.keypair())?;
    let key = aws_lc_rs::sign::any_ecdsa_type(&key)?;
    let certified = CertifiedKey::new(vec![certificate], key);
    Ok(OwnCertificate(Arc::new(certified)))
}

/// The certificates of a server: its own, and the mesh key's for those who ask to join.
#[derive(Debug)]
struct OwnCertificates {
    own: Arc<CertifiedKey>,
    mesh: Option<Arc<CertifiedKey>>,
}

impl rustls::server::ResolvesServerCert for OwnCertificates {
    fn resolve(&self, hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut offered = hello.alpn().into_iter().flatten();
        match &self.mesh {
            Some(mesh) if offered.any(|protocol| protocol == JOINING_ALPN) => Some(mesh.clone()),
            _ => Some(self.own.clone()),
        }
    }
}

impl rustls::client::ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Accepts every certificate that proves some ed25519 identity; which one is looked at after the handshake.
#[derive(Debug)]
struct AnyPeer;

impl AnyPeer {
    fn verify(
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<(), rustls::Error> {
        if !intermediates.is_empty() {
            return Err(CertificateError::BadEncoding.into());
        }
        peer_of(std::slice::from_ref(end_entity))
            .map(drop)
            .ok_or(CertificateError::ApplicationVerificationFailure.into())
    }

    /// Proves that the other end holds the certificate's key, over this very handshake.
    fn verify_signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if !SCHEMES.contains(&signed.scheme) {
            return Err(CertificateError::BadSignature.into());
        }
        certificate::parse(certificate)
            .map_err(|_| CertificateError::BadEncoding)?
            .verify_signature(signed.scheme, message, signed.signature())
            .map_err(|_| CertificateError::BadSignature)?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn refuse_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".into()))
    }
}

/// The peer that a chain proves: one certificate, validly self-signed, with the signature of an ed25519 identity.
///
/// The signature over the handshake is not part of it; rustls asks [`AnyPeer`] for that one.
fn peer_of(chain: &[CertificateDer<'_>]) -> Option<PeerId> {
    let [certificate] = chain else { return None };
    if certificate.len() > CERTIFICATE_BYTES_MAX {
        return None;
    }
    let peer = certificate::parse(certificate).ok()?.peer_id();
    crate::identity::ed25519_of(&peer).map(|_| peer)
}

impl ServerCertVerifier for AnyPeer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Self::verify(end_entity, intermediates)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

impl ClientCertVerifier for AnyPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Self::verify(end_entity, intermediates)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        SCHEMES.to_vec()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn server() -> Identity {
        Identity::from_seed(&[1; 32])
    }

    fn client() -> Identity {
        Identity::from_seed(&[2; 32])
    }

    async fn listener() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    /// Serves one connection: who came, and what they said.
    fn serve_one(
        listener: TcpListener,
        acceptor: Acceptor,
        admitted: Vec<PeerId>,
    ) -> tokio::task::JoinHandle<Result<(PeerId, Vec<u8>), TlsError>> {
        tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let (mut stream, peer, _) = acceptor
                .accept(socket, |peer| admitted.contains(peer))
                .await?;
            assert!(stream.get_ref().0.nodelay().unwrap());
            let mut said = vec![0; 5];
            stream.read_exact(&mut said).await.unwrap();
            stream.write_all(b"world").await.unwrap();
            stream.shutdown().await.unwrap();
            Ok((peer, said))
        })
    }

    #[tokio::test]
    async fn admitted_peers_talk_with_aes_128() {
        let (listener, address) = listener().await;
        let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
        let served = serve_one(listener, acceptor, vec![client().peer_id()]);
        let connector = connector(&client(), PATIENCE).unwrap();
        let mut stream = connector
            .connect(address, server().peer_id())
            .await
            .unwrap();
        assert!(stream.get_ref().0.nodelay().unwrap());
        let session = stream.get_ref().1;
        assert_eq!(
            session.negotiated_cipher_suite().unwrap().suite(),
            rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
        );
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full));
        stream.write_all(b"hello").await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"world");
        let (peer, said) = served.await.unwrap().unwrap();
        assert_eq!(peer, client().peer_id());
        assert_eq!(said, b"hello");
    }

    #[tokio::test]
    async fn second_connection_proves_identity_again() {
        let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
        let connector = connector(&client(), PATIENCE).unwrap();
        for _ in 0..2 {
            let (listener, address) = listener().await;
            let served = serve_one(listener, acceptor.clone(), vec![client().peer_id()]);
            let mut stream = connector
                .connect(address, server().peer_id())
                .await
                .unwrap();
            stream.write_all(b"hello").await.unwrap();
            stream.read_to_end(&mut Vec::new()).await.unwrap();
            assert_eq!(
                stream.get_ref().1.handshake_kind(),
                Some(rustls::HandshakeKind::Full)
            );
            served.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn stranger_is_closed_without_an_application_byte() {
        let (listener, address) = listener().await;
        let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
        let served = serve_one(listener, acceptor, vec![server().peer_id()]);
        let connector = connector(&client(), PATIENCE).unwrap();
        let mut stream = connector
            .connect(address, server().peer_id())
            .await
            .unwrap();
        let mut answer = Vec::new();
        // A clean close or a reset, depending on what was under way; a byte in neither case.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut answer))
            .await
            .unwrap();
        assert!(answer.is_empty(), "{answer:?}");
        let error = served.await.unwrap().unwrap_err();
        assert!(
            matches!(&error, TlsError::NotAdmitted { peer, .. } if *peer == client().peer_id()),
            "{error}"
        );
    }

    #[tokio::test]
    async fn server_that_is_somebody_else_is_refused() {
        let (listener, address) = listener().await;
        let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
        let served = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let (mut stream, ..) = acceptor.accept(socket, |_| true).await?;
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            Ok::<_, TlsError>(said)
        });
        let connector = connector(&client(), PATIENCE).unwrap();
        let error = connector
            .connect(address, client().peer_id())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, TlsError::WrongPeer { found, expected, .. }
                if *found == server().peer_id() && *expected == client().peer_id()),
            "{error}"
        );
        assert!(served.await.unwrap().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_newcomer_meets_the_mesh_key_and_only_where_it_is() {
        let mesh = Identity::from_seed(&[3; 32]);
        let newcomer = newcomer(&client(), PATIENCE).unwrap();
        let (listener, address) = listener().await;
        let with_key = acceptor(&server(), Some(&mesh), PATIENCE).unwrap();
        let served = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let (_, peer, purpose) = with_key.accept(socket, |_| false).await.unwrap();
            (peer, purpose)
        });
        newcomer.connect(address, mesh.peer_id()).await.unwrap();
        let expected = (client().peer_id(), Purpose::Joining);
        assert_eq!(served.await.unwrap(), expected);

        let (listener, address) = self::listener().await;
        let without = acceptor(&server(), None, PATIENCE).unwrap();
        let served = serve_one(listener, without, vec![client().peer_id()]);
        assert!(newcomer.connect(address, mesh.peer_id()).await.is_err());
        assert!(served.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn plain_http_client_gets_nothing() {
        let (listener, address) = listener().await;
        let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
        let served = serve_one(listener, acceptor, vec![]);
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket
            .write_all(b"GET /nix-cache-info HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        let _ = timeout(PATIENCE, socket.read_to_end(&mut answer))
            .await
            .unwrap();
        // At most a TLS alert: type 21, version, two bytes.
        assert!(answer.len() <= 7, "{answer:?}");
        assert!(answer.is_empty() || answer[0] == 21, "{answer:?}");
        let error = served.await.unwrap().unwrap_err();
        assert!(matches!(error, TlsError::Handshake { .. }), "{error}");
    }

    /// A client with a valid identity and the given protocols.
    fn client_offering(protocols: Vec<Vec<u8>>) -> tokio_rustls::TlsConnector {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyPeer))
            .with_client_cert_resolver(Arc::new(certificate_of(&client()).unwrap()));
        config.alpn_protocols = protocols;
        Arc::new(config).into()
    }

    #[tokio::test]
    async fn client_without_our_protocol_is_refused() {
        for protocols in [vec![], vec![b"h2".to_vec()], vec![b"libp2p".to_vec()]] {
            let (listener, address) = listener().await;
            let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
            let served = serve_one(listener, acceptor, vec![client().peer_id()]);
            let connector = client_offering(protocols.clone());
            let socket = TcpStream::connect(address).await.unwrap();
            let connected = connector
                .connect(ServerName::from(address.ip()), socket)
                .await;
            if let Ok(mut stream) = connected {
                let mut answer = Vec::new();
                let _ = stream.read_to_end(&mut answer).await;
                assert!(answer.is_empty(), "{protocols:?}: {answer:?}");
            }
            let error = served.await.unwrap().unwrap_err();
            assert!(
                matches!(
                    error,
                    TlsError::WrongProtocol { .. } | TlsError::Handshake { .. }
                ),
                "{protocols:?}: {error}"
            );
        }
    }

    #[tokio::test]
    async fn server_without_our_protocol_is_refused() {
        let (listener, address) = listener().await;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(Arc::new(AnyPeer))
            .with_cert_resolver(Arc::new(OwnCertificates {
                own: certificate_of(&server()).unwrap().0,
                mesh: None,
            }));
        config.alpn_protocols = vec![];
        let served = tokio::spawn(async move {
            let (socket, _) = listener.accept().await.unwrap();
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            if let Ok(mut stream) = acceptor.accept(socket).await {
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        });
        let connector = connector(&client(), PATIENCE).unwrap();
        let error = connector
            .connect(address, server().peer_id())
            .await
            .unwrap_err();
        assert!(matches!(error, TlsError::WrongProtocol { .. }), "{error}");
        served.await.unwrap();
    }

    #[tokio::test]
    async fn client_without_a_certificate_is_refused() {
        let (listener, address) = listener().await;
        let acceptor = acceptor(&server(), None, PATIENCE).unwrap();
        let served = serve_one(listener, acceptor, vec![client().peer_id()]);
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyPeer))
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let socket = TcpStream::connect(address).await.unwrap();
        let connected = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(ServerName::from(address.ip()), socket)
            .await;
        if let Ok(mut stream) = connected {
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            assert!(answer.is_empty(), "{answer:?}");
        }
        let error = served.await.unwrap().unwrap_err();
        assert!(matches!(error, TlsError::Handshake { .. }), "{error}");
    }

    #[tokio::test]
    async fn stalled_handshake_ends_at_its_deadline() {
        let deadline = Duration::from_millis(200);
        let (listener, address) = listener().await;
        let acceptor = acceptor(&server(), None, deadline).unwrap();
        let served = serve_one(listener, acceptor, vec![]);
        // Connects, sends the beginning of a record, and waits.
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(&[22, 3, 1]).await.unwrap();
        let error = timeout(PATIENCE, served)
            .await
            .unwrap()
            .unwrap()
            .unwrap_err();
        assert!(matches!(error, TlsError::TimedOut { .. }), "{error}");

        // And the other way: a server that accepts TCP and is silent.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connector = connector(&client(), deadline).unwrap();
        let error = connector
            .connect(silent.local_addr().unwrap(), server().peer_id())
            .await
            .unwrap_err();
        assert!(matches!(error, TlsError::TimedOut { .. }), "{error}");
    }

    #[test]
    fn certificate_lives_longer_than_any_process() {
        let own = certificate_of(&server()).unwrap();
        let chain = &own.0.cert;
        assert_eq!(peer_of(chain), Some(server().peer_id()));
        // rcgen's default dates, as GeneralizedTime: not after 4096-01-01.
        let wanted = b"40960101000000Z";
        assert!(
            chain[0].windows(wanted.len()).any(|bytes| bytes == wanted),
            "libp2p-tls makes shorter certificates than it did: they must be renewed"
        );
    }

    #[test]
    fn certificates_that_are_not_exactly_ours_are_refused() {
        let chain = certificate_of(&server()).unwrap().0.cert.clone();
        assert_eq!(peer_of(&[]), None);
        assert_eq!(peer_of(&[chain[0].clone(), chain[0].clone()]), None);
        // The part that is signed: the first element of the outer sequence, both with two bytes of length.
        assert_eq!(chain[0][..2], [0x30, 0x82]);
        assert_eq!(chain[0][4..6], [0x30, 0x82]);
        let signed = 8 + usize::from(u16::from_be_bytes([chain[0][6], chain[0][7]]));
        for index in 0..chain[0].len() {
            let mut bytes = chain[0].to_vec();
            bytes[index] ^= 1;
            match peer_of(&[CertificateDer::from(bytes)]) {
                None => {}
                // The outer copy of the algorithm's name is not signed and not used.
                Some(peer) => {
                    assert!(index >= signed, "byte {index} of {signed} may be changed");
                    assert_eq!(peer, server().peer_id());
                }
            }
        }
    }
}
