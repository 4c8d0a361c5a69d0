//! Credential: the token that is shown to one cache, fixed, or renewed by whoever gets it.

use std::sync::Arc;

use http::HeaderValue;
use tokio::sync::watch;
use zeroize::Zeroizing;

/// What is shown to a cache. Cheap to clone; all clones show the same.
#[derive(Clone, Debug)]
pub struct Credential {
    state: watch::Receiver<State>,
    refused: Arc<watch::Sender<()>>,
}

/// Renews what a [`Credential`] shows.
pub struct CredentialSource {
    state: watch::Sender<State>,
    refused: watch::Receiver<()>,
}

#[derive(Clone, Debug, Default)]
struct State {
    header: Option<HeaderValue>,
    problem: Option<String>,
}

/// A text that no header can carry.
#[derive(Debug, thiserror::Error)]
#[error("it has characters that no token has")]
pub struct NoToken;

impl Credential {
    /// Shows nothing, for ever.
    pub fn none() -> Credential {
        renewed().0
    }

    /// Shows this token, for ever.
    pub fn fixed(token: &str) -> Result<Credential, NoToken> {
        let (credential, source) = renewed();
        source.show(token)?;
        Ok(credential)
    }

    /// Shows nothing, for ever, and says why.
    pub fn without(problem: &str) -> Credential {
        let (credential, source) = renewed();
        source.fail(problem.to_owned());
        credential
    }

    /// The value of the header that carries it; `None` while there is none.
    pub fn header(&self) -> Option<HeaderValue> {
        self.state.borrow().header.clone()
    }

    /// Why there is none, or the one that there is cannot be renewed.
    pub fn problem(&self) -> Option<String> {
        self.state.borrow().problem.clone()
    }

    /// Tells whoever renews it that the cache did not take what was shown; of one that was replaced since, that is old news.
    pub fn refuse(&self, shown: &HeaderValue) {
        if self.state.borrow().header.as_ref() == Some(shown) {
            self.refused.send_replace(());
        }
    }
}

/// A credential that is not there yet, and what renews it.
pub fn renewed() -> (Credential, CredentialSource) {
    let (state, shown) = watch::channel(State::default());
    let (refused, told) = watch::channel(());
    let credential = Credential {
        state: shown,
        refused: Arc::new(refused),
    };
    (
        credential,
        CredentialSource {
            state,
            refused: told,
        },
    )
}

/// The value of the header that carries a token.
pub fn bearer(token: &str) -> Result<HeaderValue, NoToken> {
    let text = Zeroizing::new(format!("Bearer {token}"));
    let mut value = HeaderValue::from_str(&text).map_err(|_| NoToken)?;
    value.set_sensitive(true);
    Ok(value)
}

impl CredentialSource {
    /// Shows this token from here on.
    pub fn show(&self, token: &str) -> Result<(), NoToken> {
        let header = bearer(token)?;
        self.state.send_replace(State {
            header: Some(header),
            problem: None,
        });
        Ok(())
    }

    /// Goes on showing what was shown, and says why that is not renewed.
    pub fn fail(&self, problem: String) {
        self.state
            .send_modify(|state| state.problem = Some(problem));
    }

    /// Shows nothing from here on.
    pub fn withdraw(&self) {
        self.state.send_modify(|state| state.header = None);
    }

    /// Takes what was said of the one before for answered.
    pub fn forget_refusals(&mut self) {
        self.refused.mark_unchanged();
    }

    /// Waits until the cache does not take what is shown. Without an end when nobody shows it. Cancel-safe.
    pub async fn refused(&mut self) {
        if self.refused.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_renewed_is_shown_by_all_and_its_refusal_is_told_once() {
        let (credential, mut source) = renewed();
        let clone = credential.clone();
        assert!(clone.header().is_none());
        source.show("one").unwrap();
        assert_eq!(clone.header().unwrap(), "Bearer one");
        assert!(clone.header().unwrap().is_sensitive());
        let one = clone.header().unwrap();
        credential.refuse(&one);
        clone.refuse(&one);
        source.refused().await;
        source.fail("the anchor is away".to_owned());
        assert_eq!(credential.problem().unwrap(), "the anchor is away");
        assert!(credential.header().is_some());
        credential.refuse(&one);
        source.forget_refusals();
        assert!(!is_told(&mut source).await);
        source.withdraw();
        assert!(credential.header().is_none() && credential.problem().is_some());
        source.show("two").unwrap();
        assert!(credential.problem().is_none());
        assert!(source.show("a\nb").is_err());
        assert_eq!(credential.header().unwrap(), "Bearer two");
        credential.refuse(&one);
        assert!(!is_told(&mut source).await);
    }

    async fn is_told(source: &mut CredentialSource) -> bool {
        tokio::select! {
            biased;
            () = source.refused() => true,
            () = std::future::ready(()) => false,
        }
    }

    #[test]
    fn a_fixed_one_outlives_whoever_made_it() {
        let fixed = Credential::fixed("x").unwrap();
        fixed.refuse(&fixed.header().unwrap());
        assert_eq!(fixed.header().unwrap(), "Bearer x");
        assert!(Credential::none().header().is_none());
        assert_eq!(Credential::without("why").problem().unwrap(), "why");
    }
}
