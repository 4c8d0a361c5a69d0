//! The pipe: frames of one connection between its task and the behaviour, and their way over the wire.
//!
//! Not libp2p's own event channels: those are bounded in events, not in bytes, a full one stalls writing along with
//! reading, and a full one towards a handler stalls every other peer.
//!
//! Invariants: both queues are bounded in frames and in bytes; nothing is read while the incoming one is full, and
//! nothing is allocated for a length merely declared.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use bytes::{BufMut, Bytes, BytesMut};
use futures::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use libp2p::swarm::ConnectionId;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;

use super::{DownReason, Limits};

/// Small frames are written together up to this many bytes, to save a yamux frame and an encryption for each.
const BATCH_BYTES: usize = 64 << 10;

/// What is read from the substream at a time: yamux sends frames of at most 16 KiB.
const READ_BYTES: usize = 16 << 10;

/// The frames of one connection, between its task and the behaviour.
pub(super) struct Pipe {
    pub(super) connection: ConnectionId,
    /// Where the connection is named when its first unread frame arrives.
    ready: mpsc::UnboundedSender<ConnectionId>,
    outgoing: Mutex<Queue>,
    outgoing_added: Notify,
    incoming: Mutex<Queue>,
    incoming_removed: Notify,
}

#[derive(Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl Queue {
    fn push(&mut self, frame: Bytes) {
        self.bytes += frame.len();
        self.frames.push_back(frame);
    }

    fn pop(&mut self) -> Option<Bytes> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }
}

impl Pipe {
    pub(super) fn new(
        connection: ConnectionId,
        ready: mpsc::UnboundedSender<ConnectionId>,
    ) -> Pipe {
        Pipe {
            connection,
            ready,
            outgoing: Mutex::default(),
            outgoing_added: Notify::new(),
            incoming: Mutex::default(),
            incoming_removed: Notify::new(),
        }
    }

    /// Queues a frame; a full queue says how many frames and bytes it has.
    pub(super) fn push_outgoing(
        &self,
        frame: Bytes,
        limits: &Limits,
    ) -> Result<(), (usize, usize)> {
        let mut queue = lock(&self.outgoing);
        if queue.frames.len() >= limits.outgoing_frames_max
            || queue.bytes + frame.len() > limits.outgoing_bytes_max
        {
            return Err((queue.frames.len(), queue.bytes));
        }
        queue.push(frame);
        drop(queue);
        self.outgoing_added.notify_one();
        Ok(())
    }

    /// Waits for frames and puts them, framed, into `batch`: at least one, then as many as fit [`BATCH_BYTES`].
    async fn fill_batch(&self, batch: &mut BytesMut) {
        loop {
            // Before the look, so that a frame added after it leaves a permit.
            let added = self.outgoing_added.notified();
            {
                let mut queue = lock(&self.outgoing);
                while let Some(next) = queue.frames.front()
                    && (batch.is_empty() || batch.len() + 4 + next.len() <= BATCH_BYTES)
                {
                    let frame = queue.pop().expect("looked at");
                    batch.reserve(4 + frame.len());
                    batch.put_u32(u32::try_from(frame.len()).expect("below the limit"));
                    batch.put_slice(&frame);
                }
            }
            if !batch.is_empty() {
                return;
            }
            added.await;
        }
    }

    fn push_incoming(&self, frame: Bytes) {
        let mut queue = lock(&self.incoming);
        let was_empty = queue.frames.is_empty();
        queue.push(frame);
        drop(queue);
        if was_empty {
            let _ = self.ready.send(self.connection);
        }
    }

    /// Returns the next frame and whether another one waits.
    pub(super) fn pop_incoming(&self) -> Option<(Bytes, bool)> {
        let mut queue = lock(&self.incoming);
        let frame = queue.pop()?;
        let more = !queue.frames.is_empty();
        drop(queue);
        self.incoming_removed.notify_one();
        Some((frame, more))
    }

    /// Waits until another frame may be read.
    async fn incoming_room(&self, limits: &Limits) {
        loop {
            let removed = self.incoming_removed.notified();
            {
                let queue = lock(&self.incoming);
                if queue.frames.len() < limits.incoming_frames_max
                    && queue.bytes < limits.incoming_bytes_max
                {
                    return;
                }
            }
            removed.await;
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    // Nothing panics while it holds the lock, and a queue is whole at every step.
    queue.lock().unwrap_or_else(|poison| poison.into_inner())
}

/// Reads frames into the pipe until the substream ends.
pub(super) async fn read_frames(
    source: impl AsyncRead + Unpin,
    pipe: &Pipe,
    limits: &Limits,
) -> DownReason {
    let mut source = BufReader::with_capacity(READ_BYTES, source);
    loop {
        pipe.incoming_room(limits).await;
        // Between frames a link may be silent for as long as it likes: the pulse watches the connection.
        match source.fill_buf().await {
            Ok([]) => return DownReason::ClosedByPeer,
            Ok(_) => {}
            Err(error) => return error.into(),
        }
        match read_frame(&mut source, limits).await {
            Ok(frame) => pipe.push_incoming(frame),
            Err(reason) => return reason,
        }
    }
}

async fn read_frame<R: AsyncRead + Unpin>(
    source: &mut BufReader<R>,
    limits: &Limits,
) -> Result<Bytes, DownReason> {
    let mut length = BytesMut::with_capacity(4);
    read_bytes(source, 4, &mut length, limits).await?;
    let declared = length
        .iter()
        .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
    let max = limits.frame_bytes_max;
    if declared == 0 {
        return Err(DownReason::FrameEmpty);
    }
    if declared > max {
        return Err(DownReason::FrameTooLarge { declared, max });
    }
    // Grows with what arrives, not with what was declared.
    let mut body = BytesMut::with_capacity(declared.min(READ_BYTES));
    read_bytes(source, declared, &mut body, limits).await?;
    Ok(body.freeze())
}

/// Appends bytes until `target` holds `count`.
async fn read_bytes<R: AsyncRead + Unpin>(
    source: &mut BufReader<R>,
    count: usize,
    target: &mut BytesMut,
    limits: &Limits,
) -> Result<(), DownReason> {
    while target.len() < count {
        let after = limits.stall_timeout;
        let available = timeout(after, source.fill_buf())
            .await
            .map_err(|_| DownReason::ReadStalled { after })??;
        if available.is_empty() {
            return Err(DownReason::FrameTruncated);
        }
        let taken = available.len().min(count - target.len());
        target.extend_from_slice(&available[..taken]);
        source.consume_unpin(taken);
    }
    Ok(())
}

/// Writes frames of the pipe until the substream fails.
pub(super) async fn write_frames(
    mut target: impl AsyncWrite + Unpin,
    pipe: &Pipe,
    limits: &Limits,
) -> DownReason {
    let after = limits.stall_timeout;
    let mut batch = BytesMut::new();
    loop {
        batch.clear();
        pipe.fill_batch(&mut batch).await;
        let mut rest = &batch[..];
        while !rest.is_empty() {
            match timeout(after, target.write(rest)).await {
                Ok(Ok(0)) => return DownReason::ClosedByPeer,
                Ok(Ok(written)) => rest = &rest[written..],
                Ok(Err(error)) => return error.into(),
                Err(_) => return DownReason::WriteStalled { after },
            }
        }
        match timeout(after, target.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error.into(),
            Err(_) => return DownReason::WriteStalled { after },
        }
        // One large frame must not keep its memory while the link is silent.
        if batch.capacity() > 2 * BATCH_BYTES {
            batch = BytesMut::new();
        }
    }
}
