//! The shelf and its server, asked as Ganeti's nodes and QEMU ask: over HTTP.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{Method, StatusCode};
use reqwest::{Client, Response};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::connection::Bounded;
use super::{Media, Seed, Seeds, Shelf, seed, serve};
use crate::cloud::{BoxFuture, CloudError, ErrorKind, ImageSource, ImageStream, Result};

const IMAGE: &str = "abc/v1.12.0/metal-amd64";
/// More than is read at once.
const LENGTH: usize = 200_000;

fn iso() -> Bytes {
    (0..LENGTH).map(|index| (index % 251) as u8).collect()
}

/// A source that counts how often it was opened, and may break off.
#[derive(Default)]
struct Source {
    opened: AtomicUsize,
    breaks: bool,
}

struct Stream {
    left: Bytes,
    breaks: bool,
}

impl ImageSource for Source {
    fn open(&self) -> BoxFuture<'_, Result<Box<dyn ImageStream>>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let stream = Stream {
            left: iso(),
            breaks: self.breaks,
        };
        Box::pin(async { Ok(Box::new(stream) as Box<dyn ImageStream>) })
    }
}

impl ImageStream for Stream {
    fn next(&mut self, _: usize) -> BoxFuture<'_, Result<Option<Bytes>>> {
        Box::pin(async {
            if self.breaks && self.left.len() < LENGTH {
                return Err(CloudError::new(
                    "test",
                    "read",
                    ErrorKind::Unavailable,
                    "on purpose",
                ));
            }
            let chunk = self.left.split_to(70_000.min(self.left.len()));
            Ok((!chunk.is_empty()).then_some(chunk))
        })
    }

    fn sha256(&self) -> String {
        String::new()
    }
}

/// A shelf that is served.
struct Room {
    folder: TempDir,
    shelf: Shelf,
    seeds: Seeds,
    url: String,
    http: Client,
    _server: JoinSet<std::io::Result<()>>,
}

impl Room {
    async fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let media = Media::new(folder.path().join("media"), &url);
        let mut server = JoinSet::new();
        server.spawn(serve(media.clone(), listener));
        Self {
            folder,
            shelf: media.shelf,
            seeds: media.seeds,
            url,
            http: Client::builder().no_proxy().build().unwrap(),
            _server: server,
        }
    }

    async fn ask(&self, method: Method, address: &str, headers: &[(&str, &str)]) -> Response {
        let mut request = self.http.request(method, address);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    }

    async fn get(&self, headers: &[(&str, &str)]) -> Response {
        self.ask(Method::GET, &self.shelf.address(IMAGE), headers).await
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join("media")).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn file(&self, end: &str) -> std::path::PathBuf {
        let address = self.shelf.address(IMAGE);
        let name = address.rsplit('/').nth(1).unwrap();
        self.folder.path().join("media").join(format!("{name}.{end}"))
    }
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    response
        .headers()
        .get(name)
        .map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn a_head_tells_length_and_that_ranges_are_served() {
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    // With a range as well: QEMU's curl may send one.
    for headers in [&[][..], &[("range", "bytes=0-9")]] {
        let answer = room.ask(Method::HEAD, &room.shelf.address(IMAGE), headers).await;
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(header(&answer, "accept-ranges"), "bytes");
        assert_eq!(header(&answer, "content-length"), LENGTH.to_string());
        assert_eq!(answer.bytes().await.unwrap(), Bytes::new());
    }
}

#[tokio::test]
async fn a_medium_is_read_whole_and_in_parts() {
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    let whole = room.get(&[]).await;
    assert_eq!(whole.status(), StatusCode::OK);
    assert_eq!(whole.bytes().await.unwrap(), iso());
    for (range, first, last) in [
        ("bytes=0-0", 0, 0),
        ("bytes=65535-65537", 65_535, 65_537),
        ("bytes=199990-", 199_990, 199_999),
        ("bytes=-5", 199_995, 199_999),
        ("bytes=100000-999999", 100_000, 199_999),
    ] {
        let answer = room.get(&[("range", range)]).await;
        assert_eq!(answer.status(), StatusCode::PARTIAL_CONTENT, "{range}");
        let told = format!("bytes {first}-{last}/{LENGTH}");
        assert_eq!(header(&answer, "content-range"), told, "{range}");
        assert_eq!(
            answer.bytes().await.unwrap(),
            iso().slice(first..=last),
            "{range}"
        );
    }
    let beyond = room.get(&[("range", "bytes=200000-")]).await;
    assert_eq!(beyond.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(header(&beyond, "content-range"), format!("bytes */{LENGTH}"));
}

#[tokio::test]
async fn a_rest_is_given_of_the_same_version_alone() {
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    let version = header(&room.get(&[]).await, "etag").to_owned();
    let rest = |version: String| {
        let room = &room;
        async move {
            room.get(&[("range", "bytes=9-"), ("if-range", &version)])
                .await
                .status()
        }
    };
    assert_eq!(rest(version.clone()).await, StatusCode::PARTIAL_CONTENT);
    assert_eq!(rest("\"another\"".to_owned()).await, StatusCode::OK);
    assert_eq!(
        rest("Wed, 21 Oct 2015 07:28:00 GMT".to_owned()).await,
        StatusCode::OK
    );
    // To be asked for is no change.
    assert_eq!(header(&room.get(&[]).await, "etag"), version);
}

#[tokio::test]
async fn nothing_else_is_served() {
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    fs::write(room.folder.path().join("media/secret.iso"), "x").unwrap();
    let address = room.shelf.address(IMAGE);
    let name = address.rsplit('/').nth(1).unwrap();
    let url = &room.url;
    for path in [
        url.clone(),
        format!("{url}/"),
        format!("{url}/secret.iso"),
        format!("{url}/secret/talos.iso"),
        format!("{url}/{name}"),
        format!("{url}/{name}/"),
        format!("{url}/{name}.iso"),
        format!("{url}/{}/talos.iso", name.to_uppercase()),
        format!("{url}/{name}/../{name}/talos.iso/"),
        format!("{url}/..%2f{name}/talos.iso"),
        room.shelf.address("abc/v1.12.1/metal-amd64"),
    ] {
        let answer = room.ask(Method::GET, &path, &[]).await;
        assert_eq!(answer.status(), StatusCode::NOT_FOUND, "{path}");
        assert_eq!(answer.bytes().await.unwrap(), Bytes::new(), "{path}");
    }
    for method in [Method::PUT, Method::DELETE, Method::POST] {
        let answer = room.ask(method, &address, &[]).await;
        assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
    }
    assert!(room.shelf.has(IMAGE).await.unwrap());
}

#[tokio::test]
async fn a_shelf_that_vanished_is_filled_again_under_the_same_address() {
    let room = Room::open().await;
    let source = Source::default();
    assert!(!room.shelf.has(IMAGE).await.unwrap());
    assert_eq!(room.get(&[]).await.status(), StatusCode::NOT_FOUND);
    room.shelf.put(IMAGE, &source).await.unwrap();
    room.shelf.put(IMAGE, &source).await.unwrap();
    assert_eq!(source.opened.load(Ordering::Relaxed), 1, "it was there");
    let address = room.shelf.address(IMAGE);
    assert!(!room.shelf.misses(&address).await.unwrap());

    fs::remove_dir_all(room.folder.path().join("media")).unwrap();
    assert!(!room.shelf.has(IMAGE).await.unwrap());
    assert!(room.shelf.misses(&address).await.unwrap());
    assert_eq!(room.get(&[]).await.status(), StatusCode::NOT_FOUND);

    // A daemon of its own, as after a restart.
    let another = Shelf::new(room.folder.path().join("media"), format!("{}/", room.url));
    another.put(IMAGE, &source).await.unwrap();
    assert_eq!(another.address(IMAGE), address);
    assert_eq!(room.get(&[]).await.bytes().await.unwrap(), iso());
}

#[tokio::test]
async fn a_medium_that_vanishes_while_it_is_read_is_read_to_its_end() {
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    let answer = room.get(&[]).await;
    fs::remove_file(room.file("iso")).unwrap();
    assert_eq!(answer.bytes().await.unwrap(), iso());
}

#[tokio::test]
async fn what_was_cut_off_is_never_served_and_swept() {
    let room = Room::open().await;
    let broken = Source {
        breaks: true,
        ..Source::default()
    };
    room.shelf.put(IMAGE, &broken).await.unwrap_err();
    assert!(!room.shelf.has(IMAGE).await.unwrap());
    assert_eq!(room.get(&[]).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(room.files().len(), 1, "the part");
    room.shelf.put("other", &Source::default()).await.unwrap();
    assert!(!room.file("part").exists());
}

#[tokio::test]
async fn two_imports_at_once_fetch_once() {
    let room = Room::open().await;
    let source = Source::default();
    let (one, two) = tokio::join!(room.shelf.put(IMAGE, &source), room.shelf.put(IMAGE, &source));
    one.unwrap();
    two.unwrap();
    assert_eq!(source.opened.load(Ordering::Relaxed), 1);
    assert_eq!(room.files().len(), 1);
}

#[tokio::test]
async fn what_nobody_asks_for_goes_and_nothing_else() {
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    let strangers = room.folder.path().join("media/stranger.iso");
    fs::write(&strangers, "x").unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(60 * 24 * 3600);
    let make_old = || {
        for file in [&strangers, &room.file("iso")] {
            let file = fs::File::options().write(true).open(file).unwrap();
            file.set_modified(long_ago).unwrap();
        }
    };
    make_old();
    room.get(&[]).await.bytes().await.unwrap();
    room.shelf.put("second", &Source::default()).await.unwrap();
    assert!(room.shelf.has(IMAGE).await.unwrap(), "it was asked for");
    make_old();
    room.shelf.put("third", &Source::default()).await.unwrap();
    assert!(!room.shelf.has(IMAGE).await.unwrap());
    assert!(strangers.exists());
}

#[tokio::test]
async fn others_cannot_look_into_the_folder() {
    use std::os::unix::fs::PermissionsExt;
    let room = Room::open().await;
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&room.folder.path().join("media")), 0o700);
    assert_eq!(mode(&room.file("iso")), 0o600);
}

#[test]
fn an_address_is_never_shown() {
    let shelf = Shelf::new("/nowhere", "http://10.0.0.1:8080/");
    // Of its own: what another test has shown nothing of is not hidden yet.
    let address = shelf.address("never-shown/v1.12.0/metal-amd64");
    assert!(address.starts_with("http://10.0.0.1:8080/"), "{address}");
    assert_ne!(address, shelf.address("abc/v1.12.1/metal-amd64"));
    let what = format!("job 7: {address} cannot be opened");
    let error = CloudError::new("ganeti", "start instance", ErrorKind::Rejected, what).to_string();
    assert!(
        error.contains("http://10.0.0.1:8080/<redacted>/talos.iso"),
        "{error}"
    );
}

#[tokio::test]
async fn an_address_of_others_is_none_of_ours() {
    let room = Room::open().await;
    for address in ["", "/srv/talos.iso", "http://mirror/talos.iso"] {
        assert!(!room.shelf.is_ours(address), "{address}");
        assert!(!room.shelf.misses(address).await.unwrap(), "{address}");
    }
    assert!(room.shelf.is_ours(&room.shelf.address(IMAGE)));
}

#[tokio::test]
async fn a_folder_that_cannot_be_written_is_named() {
    let room = Room::open().await;
    fs::write(room.folder.path().join("media"), "a file").unwrap();
    let error = room.shelf.put(IMAGE, &Source::default()).await.unwrap_err();
    assert!(error.to_string().contains("set another folder"), "{error}");
    assert!(error.to_string().contains("media"), "{error}");
}

const SEED: Seed<'static> = Seed {
    instance_id: "0b6ff3a2",
    hostname: "web",
    user_data: b"kind: SideroLinkConfig\n",
};

impl Room {
    /// Status and body.
    async fn told(&self, address: &str, file: &str) -> (u16, String) {
        let answer = self.ask(Method::GET, &format!("{address}{file}"), &[]).await;
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// Changes what stands in the file of the one seed.
    fn change_seed(&self, change: impl FnOnce(&mut serde_json::Value)) {
        let [name] = &self.files()[..] else {
            panic!("{:?}", self.files())
        };
        let path = self.folder.path().join("media").join(name);
        let mut kept = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut kept);
        fs::write(&path, kept.to_string()).unwrap();
    }
}

#[tokio::test]
async fn a_machine_reads_its_seed_twice_as_talos_does() {
    let room = Room::open().await;
    let address = room.seeds.address();
    assert!(
        room.seeds
            .put(&format!("-smbios {address} -x"), SEED)
            .await
            .unwrap()
    );
    for _ in 0..2 {
        let (status, meta) = room.told(&address, "meta-data").await;
        let meta: serde_json::Value = serde_saphyr::from_str(&meta).unwrap();
        assert_eq!(status, 200);
        assert_eq!(meta["instance-id"], "0b6ff3a2");
        assert_eq!(meta["local-hostname"], "web");
        let (status, network) = room.told(&address, "network-config").await;
        let network: serde_json::Value = serde_saphyr::from_str(&network).unwrap();
        assert_eq!((status, &network["version"]), (200, &1.into()));
        let user = (200, "kind: SideroLinkConfig\n".to_owned());
        assert_eq!(room.told(&address, "user-data").await, user);
    }
    for file in ["vendor-data", "", "talos.iso"] {
        assert_eq!(room.told(&address, file).await.0, 404, "{file}");
    }
    let head = room.ask(Method::HEAD, &format!("{address}user-data"), &[]).await;
    assert_eq!(head.status(), 404);
}

#[tokio::test]
async fn a_seed_is_for_the_first_who_reads_it_and_for_an_hour() {
    let room = Room::open().await;
    let address = room.seeds.address();
    room.seeds.put(&address, SEED).await.unwrap();
    // From another address, which loopback has plenty of.
    let other = Client::builder()
        .no_proxy()
        .local_address(Some([127, 0, 0, 2].into()))
        .build()
        .unwrap();
    let theirs = async || {
        let answer = other.get(format!("{address}user-data")).send().await.unwrap();
        answer.status().as_u16()
    };
    assert_eq!(room.told(&address, "user-data").await.0, 200);
    assert_eq!(theirs().await, 404);
    assert_eq!(
        room.told(&address, "user-data").await.0,
        200,
        "the first one again"
    );

    // A start anew is another boot.
    room.seeds.put(&address, SEED).await.unwrap();
    assert_eq!(theirs().await, 200);
    assert_eq!(room.told(&address, "user-data").await.0, 404);
    room.change_seed(|kept| {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        let until = kept["until"].as_u64().unwrap();
        assert!((now + 3500..now + 3700).contains(&until), "{until}");
        kept["until"] = now.into();
    });
    assert_eq!(theirs().await, 404);
}

#[tokio::test]
async fn what_is_over_is_swept_and_asked_for_in_vain_without_a_delay() {
    let room = Room::open().await;
    let address = room.seeds.address();
    room.seeds.put(&address, SEED).await.unwrap();
    room.shelf.put(IMAGE, &Source::default()).await.unwrap();
    room.seeds.sweep().await.unwrap();
    assert_eq!(room.files().len(), 2);
    fs::remove_file(room.file("iso")).unwrap();
    room.change_seed(|kept| kept["until"] = 1.into());
    room.seeds.sweep().await.unwrap();
    assert_eq!(room.files(), [""; 0]);
    // Talos tries again for three minutes after any other answer.
    assert_eq!(room.told(&address, "meta-data").await.0, 204);
    assert_eq!(room.told(&address, "network-config").await.0, 204);
    assert_eq!(room.told(&address, "user-data").await.0, 404);
}

#[tokio::test]
async fn a_seed_survives_the_process_and_goes_when_its_machine_goes() {
    let room = Room::open().await;
    let address = room.seeds.address();
    // Another process wrote it.
    let another = Seeds::new(room.folder.path().join("media"), "http://elsewhere");
    another.put(&address, SEED).await.unwrap();
    assert_eq!(room.told(&address, "user-data").await.0, 200);
    room.seeds.remove(&address).await.unwrap();
    room.seeds.remove(&address).await.unwrap();
    assert_eq!(room.files(), [""; 0]);
    assert_eq!(room.told(&address, "user-data").await.0, 404);
    assert!(!room.seeds.put("-smbios type=1,serial=mine", SEED).await.unwrap());
    assert_eq!(room.files(), [""; 0]);
}

#[tokio::test]
async fn others_cannot_read_the_file_of_a_seed() {
    use std::os::unix::fs::PermissionsExt;
    let room = Room::open().await;
    room.seeds.put(&room.seeds.address(), SEED).await.unwrap();
    let path = room.folder.path().join("media").join(&room.files()[0]);
    assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn no_two_seeds_have_one_address_and_none_is_shown() {
    let seeds = Seeds::new("/nowhere", "http://10.0.0.1/");
    let (one, two) = (seeds.address(), seeds.address());
    assert_ne!(one, two);
    assert_eq!(
        seed::hide(&format!("at {one}, {two}user-data, seed-abc")),
        "at http://10.0.0.1/<redacted>/, http://10.0.0.1/<redacted>/user-data, seed-abc"
    );
}

#[tokio::test]
async fn a_connection_on_which_nothing_happens_makes_room_for_the_next() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = axum::Router::new().fallback(async || "here");
    let mut server = JoinSet::new();
    let bounded = Bounded::of(listener, 1, Duration::from_millis(200));
    server.spawn(axum::serve(bounded, router).into_future());
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut second = TcpStream::connect(address).await.unwrap();
    second.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    second.read_to_string(&mut answer).await.unwrap();
    assert!(answer.ends_with("here"), "{answer}");
    assert_eq!(silent.read(&mut [0]).await.unwrap(), 0, "it was closed");
}
