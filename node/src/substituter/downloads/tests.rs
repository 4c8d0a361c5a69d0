use super::*;

const CHUNK: usize = 64 * 1024;

/// A NAR of which each chunk differs.
fn chunk(number: u64) -> Bytes {
    Bytes::from(vec![number as u8; CHUNK])
}

fn download(window_chunks: u32) -> Arc<Download> {
    Arc::new(Download::new(
        window_chunks * CHUNK as u32,
        Duration::from_millis(1),
        None,
    ))
}

/// Reads what is there.
fn drain(download: &Download, reader: u64, to: u64) -> Vec<Bytes> {
    let mut chunks = Vec::new();
    while let Taken::Bytes(bytes) = download.take(reader, to) {
        chunks.push(bytes);
    }
    chunks
}

/// Lets tasks go on until none can.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_comes_while_the_beginning_is_there_reads_the_same_bytes() {
    let download = download(10);
    let first = download.window().add_reader(0);
    let (sender, chunks) = mpsc::channel(CHUNKS_WAITING_MAX);
    let to = 5 * CHUNK as u64;
    let filling = tokio::spawn({
        let download = download.clone();
        async move { download.fill(chunks, to).await }
    });
    for number in 0..4 {
        sender.send(Ok(chunk(number))).await.unwrap();
    }
    settle().await;
    assert_eq!(drain(&download, first, to).len(), 4);
    let second = download.window().join(0).unwrap();
    let ranged = download.window().join(CHUNK as u64 / 2).unwrap();
    sender.send(Ok(chunk(4))).await.unwrap();
    drop(sender);
    filling.await.unwrap();
    let all: Vec<Bytes> = (0..5).map(chunk).collect();
    assert_eq!(drain(&download, first, to), all[4..]);
    assert_eq!(drain(&download, second, to), all);
    let half: usize = drain(&download, ranged, CHUNK as u64)
        .iter()
        .map(Bytes::len)
        .sum();
    assert_eq!(half, CHUNK / 2);
    assert!(matches!(download.take(first, to), Taken::End));
    // Even now, for as long as somebody reads.
    assert!(download.window().join(0).is_some());
}

#[tokio::test]
async fn the_window_is_bounded_by_its_slowest_reader_and_moves_with_it() {
    let download = download(3);
    let reader = download.window().add_reader(0);
    let (sender, chunks) = mpsc::channel(1);
    let to = 100 * CHUNK as u64;
    let filling = tokio::spawn({
        let download = download.clone();
        async move { download.fill(chunks, to).await }
    });
    let sending = tokio::spawn(async move {
        for number in 0..100 {
            sender.send(Ok(chunk(number))).await.unwrap();
        }
    });
    let mut read = Vec::new();
    while read.len() < 100 {
        settle().await;
        assert!(download.window().chunks.len() <= 3);
        match download.take(reader, to) {
            Taken::Bytes(bytes) => read.push(bytes),
            _ => panic!("nothing more after {}", read.len()),
        }
    }
    assert_eq!(read, (0..100).map(chunk).collect::<Vec<_>>());
    sending.await.unwrap();
    filling.await.unwrap();
    assert!(download.window().join(0).is_none(), "its beginning is gone");
}

#[tokio::test]
async fn who_holds_up_others_is_let_go_and_who_holds_up_nobody_is_not() {
    let download = download(3);
    let (slow, fast) = {
        let mut window = download.window();
        (window.add_reader(0), window.add_reader(0))
    };
    let (sender, chunks) = mpsc::channel(1);
    let to = 100 * CHUNK as u64;
    tokio::spawn({
        let download = download.clone();
        async move { download.fill(chunks, to).await }
    });
    tokio::spawn(async move {
        for number in 0..100 {
            let _ = sender.send(Ok(chunk(number))).await;
        }
    });
    settle().await;
    // Neither reads: nobody waits for anybody.
    let room = download.window().make_room();
    assert!(matches!(room, Room::None { is_felt: false }));
    assert_eq!(drain(&download, fast, to).len(), 3);
    let room = download.window().make_room();
    assert!(matches!(room, Room::None { is_felt: true }));
    while download.window().readers.len() == 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(matches!(download.take(slow, to), Taken::LetGo));
    settle().await;
    assert!(!drain(&download, fast, to).is_empty(), "it goes on");
}

#[tokio::test]
async fn a_failure_reaches_every_reader_after_the_bytes_before_it_and_nobody_joins() {
    let download = download(10);
    let (one, other) = {
        let mut window = download.window();
        (window.add_reader(0), window.add_reader(0))
    };
    let (sender, chunks) = mpsc::channel(2);
    sender.send(Ok(chunk(0))).await.unwrap();
    sender.send(Err(Cut::NoSource)).await.unwrap();
    download.fill(chunks, 2 * CHUNK as u64).await;
    for reader in [one, other] {
        assert_eq!(drain(&download, reader, 2 * CHUNK as u64).len(), 1);
        let taken = download.take(reader, 2 * CHUNK as u64);
        assert!(matches!(taken, Taken::Cut(Cut::NoSource)));
    }
    assert!(download.window().join(0).is_none());
}

#[tokio::test]
async fn bytes_that_stop_early_without_a_word_are_no_end() {
    let download = download(10);
    let reader = download.window().add_reader(0);
    let (sender, chunks) = mpsc::channel(2);
    sender.send(Ok(chunk(0))).await.unwrap();
    drop(sender);
    download.fill(chunks, 2 * CHUNK as u64).await;
    drain(&download, reader, 2 * CHUNK as u64);
    let taken = download.take(reader, 2 * CHUNK as u64);
    assert!(matches!(taken, Taken::Cut(Cut::NoSource)));
}

#[tokio::test]
async fn the_download_ends_with_its_last_reader() {
    let download = download(10);
    let (one, other) = {
        let mut window = download.window();
        (window.add_reader(0), window.add_reader(0))
    };
    let (sender, chunks) = mpsc::channel::<Result<Bytes, Cut>>(2);
    let filling = tokio::spawn({
        let download = download.clone();
        async move { download.fill(chunks, CHUNK as u64).await }
    });
    download.leave(one);
    settle().await;
    assert!(!sender.is_closed());
    download.leave(other);
    filling.await.unwrap();
    assert!(sender.is_closed());
    assert!(download.window().join(0).is_none());
}
