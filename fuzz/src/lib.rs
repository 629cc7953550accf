//! The doors through which bad input comes, a function for each: the fuzz targets and `tests/bad_input.rs` knock at them.
//!
//! A find is a panic, an error that is no help to a person, a promise that does not hold, or memory or time without bound.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use omni_infra_provider::backends::oxide::{self, Oxide, Project};
use omni_infra_provider::cloud::{Cloud, CloudError, ImageKey, InstanceRef, Mark, UserData};
use omni_infra_provider::config::setting::Flags;
use omni_infra_provider::config::{self, Faults};
use omni_infra_provider::engine::download::{self, Download};
use omni_infra_provider::machine::desired::Parsed;
use omni_infra_provider::omni::kinds::{self, Kind, MachineRequestSpec};
use omni_infra_provider::omni::{ServiceAccount, management, watch};
use omni_infra_provider::secret::Secret;
use omni_infra_provider::talos::image::image_key;
use omni_infra_provider::talos::join::JoinParams;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// Takes whatever comes.
type Target = fn(&[u8]);

/// Every door, by the name of its target and of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("provider_data", provider_data),
    ("machine_request", machine_request),
    ("settings_file", settings_file),
    ("service_account_key", service_account_key),
    ("cosi_message", cosi_message),
    ("join_config", join_config),
    ("oxide_answers", oxide_answers),
    ("factory_stream", factory_stream),
    ("schematic_answer", schematic_answer),
];

/// Most characters of an error that a person can be expected to read: two dozen faults.
const READABLE: usize = 10_000;

/// An error is a line of some words.
fn assert_clear(error: &str) {
    assert!(!error.trim().is_empty(), "an error without words");
    let length = error.chars().count();
    assert!(length <= READABLE, "an error of {length} characters");
    assert!(!error.contains(char::is_control), "not a line: {error:?}");
}

/// The YAML of a machine class.
pub fn provider_data(input: &[u8]) {
    read_request(&MachineRequestSpec {
        talos_version: "1.12.0".to_owned(),
        provider_data: String::from_utf8_lossy(input).into_owned(),
        ..MachineRequestSpec::default()
    });
}

/// The spec of a machine request, as protobuf.
pub fn machine_request(input: &[u8]) {
    if let Ok(request) = kinds::MachineRequests::decode(input) {
        read_request(&request);
    }
}

fn read_request(request: &MachineRequestSpec) {
    match Parsed::<Oxide>::read(request, &[]) {
        Parsed::Good(desired) => {
            assert!(
                image_key(
                    &desired.talos_version,
                    &desired.schematic.input_hash(),
                    &desired.boot
                )
                .is_ok()
            );
            let yaml = desired.schematic.yaml();
            assert!(yaml.contains("customization:"));
        }
        Parsed::Bad { reason, .. } => assert_clear(&reason),
    }
}

/// The file of settings.
pub fn settings_file(input: &[u8]) {
    let path = std::env::temp_dir().join(format!("settings-{}.toml", std::process::id()));
    fs::write(&path, input).expect("the temporary folder takes a file");
    let environment = BTreeMap::from([("CONFIG".to_owned(), path.display().to_string())]);
    match config::load(&Flags::default(), &environment) {
        Ok(loaded) => {
            assert!(
                loaded
                    .config
                    .to_string()
                    .contains("service_account_key = \"<redacted>\"")
            );
            loaded.warnings.iter().for_each(|warning| assert_clear(warning));
        }
        Err(Faults(faults)) => faults.iter().for_each(|fault| assert_clear(fault)),
    }
}

/// A service account key, broken in one of its layers. The first byte tells which.
pub fn service_account_key(input: &[u8]) {
    let Some((layer, rest)) = input.split_first() else {
        return;
    };
    let of_armour = |armour: &str| {
        let json = serde_json::json!({ "name": "infra-provider:oxide", "pgp_key": armour });
        STANDARD.encode(json.to_string())
    };
    let text = match layer % 4 {
        0 => String::from_utf8_lossy(rest).into_owned(),
        1 => STANDARD.encode(rest),
        2 => of_armour(&String::from_utf8_lossy(rest)),
        _ => of_armour(&format!(
            "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{}\n-----END PGP PRIVATE KEY BLOCK-----\n",
            STANDARD.encode(rest)
        )),
    };
    match ServiceAccount::parse(&Secret::new(text)) {
        Ok(account) => assert!(!account.name().contains(char::is_whitespace)),
        Err(error) => assert_clear(&error.to_string()),
    }
}

/// A message of a watch, and the spec of a resource. The first byte tells of which kind.
pub fn cosi_message(input: &[u8]) {
    let Some((kind, rest)) = input.split_first() else {
        return;
    };
    fn read<K: Kind>(bytes: &[u8]) {
        if let Err(error) = watch::understand::<K>(bytes, "oxide") {
            assert!(!error.is_empty());
        }
        match K::decode(bytes) {
            Ok(spec) => assert_eq!(K::encode(&spec, bytes), bytes, "an unchanged spec was changed"),
            Err(error) => assert_clear(&error),
        }
    }
    let readers: [fn(&[u8]); 12] = [
        read::<kinds::MachineRequests>,
        read::<kinds::MachineRequestStatuses>,
        read::<kinds::ConfigPatchRequests>,
        read::<kinds::InfraProviderStatuses>,
        read::<kinds::InfraProviderHealthStatuses>,
        read::<kinds::ProviderJoinConfigs>,
        read::<kinds::SiderolinkApiConfigs>,
        read::<kinds::ConnectionParams>,
        read::<kinds::FeaturesConfigs>,
        read::<kinds::TalosVersions>,
        read::<kinds::CurrentUsers>,
        |bytes| {
            read::<kinds::MachineResources>(bytes);
            if let Some(legacy) = Oxide::legacy(bytes) {
                assert!(!legacy.scope.0.is_empty());
            }
        },
    ];
    readers[usize::from(*kind) % readers.len()](rest);
}

/// The inputs of a join config, a line each: URL, token, request. What is rendered has to be read back.
pub fn join_config(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let mut lines = text.splitn(3, '\n');
    let mut line = || lines.next().unwrap_or_default().to_owned();
    let (api_url, token, request) = (line(), line(), line());
    let params = JoinParams {
        api_url,
        token: Secret::new(token),
        token_version: 2,
        events_port: 8090,
        logs_port: 8092,
        provider: "oxide".to_owned(),
        request: Some(request),
        tunnel: input.len().is_multiple_of(2),
    };
    let (url, documents) = match (params.url(), params.documents()) {
        (Ok(url), Ok(documents)) => (url, documents),
        (Err(error), Err(same)) => {
            assert_eq!(error, same);
            return assert_clear(&error.to_string());
        }
        (url, documents) => panic!("{:?}, but {:?}", url.is_ok(), documents.is_ok()),
    };
    let parsed = url::Url::parse(url.expose()).expect("a URL");
    let token = parsed.query_pairs().find(|(name, _)| name == "jointoken");
    assert_eq!(
        token.expect("a token").1,
        params.token().expect("a token").expose()
    );
    let documents: Vec<Value> = serde_saphyr::from_multiple(documents.expose()).expect("YAML");
    assert_eq!(documents.len(), 3);
    assert_eq!(documents[0]["apiUrl"], url.expose());
}

/// What a silo answers to call after call: `<status> <body>`, with a line `---` between answers; the last one is repeated.
pub fn oxide_answers(input: &[u8]) {
    static SILO: LazyLock<Mutex<Silo>> = LazyLock::new(|| Mutex::new(Silo::start()));
    let silo = SILO.lock().unwrap_or_else(PoisonError::into_inner);
    let scope = Project("prod".to_owned());
    let key = ImageKey {
        talos_version: "1.12.0".to_owned(),
        schematic: "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba".to_owned(),
        platform: "nocloud".to_owned(),
        arch: "amd64".to_owned(),
    };
    let named = InstanceRef {
        scope: scope.clone(),
        name: "web-x7k".to_owned(),
        id: None,
        mark: Mark {
            provider: "oxide".to_owned(),
            request: "web-x7k".to_owned(),
            installation: "0b6ff3a2-0000-4000-8000-000000000001".to_owned(),
        },
        adopt_bare: true,
    };
    let known = InstanceRef {
        id: Some("3f6dcb9a-8a0c-4b54-9b44-4a1a9b1c3b11".to_owned()),
        ..named.clone()
    };
    let no_data = UserData(Vec::new());
    let verbs: [&dyn Fn() -> Result<(), CloudError>; 7] = [
        &|| silo.ask(silo.oxide.check()),
        &|| silo.ask(async { silo.oxide.find_image(&scope, &key).await.map(drop) }),
        &|| silo.ask(async { silo.oxide.find_instance(&named).await.map(drop) }),
        &|| {
            let list = silo
                .oxide
                .list_instances(&scope, "oxide", &named.mark.installation);
            silo.ask(async { list.await.map(drop) })
        },
        &|| silo.ask(silo.oxide.start_instance(&known, &no_data)),
        &|| silo.ask(silo.oxide.delete_instance(&known)),
        &|| silo.ask(silo.oxide.delete_instance(&named)),
    ];
    for verb in verbs {
        silo.answers(input);
        if let Err(error) = verb() {
            assert_clear(&error.to_string());
        }
    }
}

type Answers = Arc<Mutex<VecDeque<Vec<u8>>>>;

/// A server on loopback that answers what it was told, and the backend that asks it.
struct Silo {
    runtime: Runtime,
    oxide: Oxide,
    answers: Answers,
}

impl Silo {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let answers = Answers::default();
        let listener = runtime
            .block_on(TcpListener::bind("127.0.0.1:0"))
            .expect("a port");
        let address = listener.local_addr().expect("an address");
        let told = answers.clone();
        // It lives as long as the runtime.
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::task::spawn(serve(stream, told.clone()));
            }
        });
        let _entered = runtime.enter();
        let oxide = Oxide::new(&oxide::Settings {
            host: format!("http://{address}"),
            token: Secret::new("oxide-token"),
            ca_bundle: None,
            provider_id: "oxide".to_owned(),
        })
        .expect("good settings");
        drop(_entered);
        Self {
            runtime,
            oxide,
            answers,
        }
    }

    fn ask(&self, verb: impl Future<Output = Result<(), CloudError>>) -> Result<(), CloudError> {
        self.runtime.block_on(verb)
    }

    fn answers(&self, input: &[u8]) {
        let mut answers = VecDeque::new();
        let mut rest = input;
        loop {
            let separator = b"\n---\n";
            let end = rest
                .windows(separator.len())
                .position(|window| window == separator);
            answers.push_back(answer(rest.get(..end.unwrap_or(rest.len())).unwrap_or_default()));
            match end {
                Some(end) => rest = &rest[end + separator.len()..],
                None => break,
            }
        }
        *self.answers.lock().unwrap_or_else(PoisonError::into_inner) = answers;
    }
}

/// An answer on the wire.
fn answer(part: &[u8]) -> Vec<u8> {
    let told = part
        .get(..3)
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
    let (status, body): (u16, &[u8]) = match told {
        Some(status @ 200..=599) => (status, part.get(4..).unwrap_or_default()),
        _ => (200, part),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nx-request-id: r\r\ncontent-length: {length}\r\n\r\n"
    );
    [head.as_bytes(), body].concat()
}

/// Answers each request on a connection with the next answer.
async fn serve(stream: TcpStream, answers: Answers) {
    let mut stream = BufReader::new(stream);
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            match stream.read_line(&mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) if line == "\r\n" => break,
                Ok(_) => {}
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap_or_default();
            }
        }
        let mut body = vec![0; length];
        if stream.read_exact(&mut body).await.is_err() {
            return;
        }
        let answer = {
            let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
            match answers.len() {
                0 | 1 => answers.front().cloned().unwrap_or_default(),
                _ => answers.pop_front().unwrap_or_default(),
            }
        };
        if stream.write_all(&answer).await.is_err() {
            return;
        }
    }
}

/// How the formats that have one begin.
const MAGIC: &[(&str, &[u8])] = &[
    ("raw", b""),
    ("raw.xz", b"\xfd7zXZ\0"),
    ("raw.gz", b"\x1f\x8b"),
    ("raw.zst", b""),
];

/// Most bytes of an image here.
const IMAGE: u64 = 1 << 20;

/// A compressed image. The first byte tells the format and into what chunks it is cut.
pub fn factory_stream(input: &[u8]) {
    let Some((how, body)) = input.split_first() else {
        return;
    };
    let (format, magic) = MAGIC[usize::from(*how) % MAGIC.len()];
    let size = 1 << (how / 16);
    let chunks = body.chunks(size).map(Bytes::copy_from_slice).collect();
    let settings = download::Settings {
        max_bytes: IMAGE,
        ..download::Settings::default()
    };
    let locate = Arc::new(|| -> omni_infra_provider::cloud::BoxFuture<'static, _> {
        Box::pin(async { panic!("nothing has to be asked for") })
    });
    let download = Download::new("image", locate, settings);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut stream = download.decode_chunks(format, chunks).expect("a known format");
        let ask = 64 * 1024;
        let mut received = 0;
        let mut short = false;
        loop {
            match stream.next(ask).await {
                Ok(Some(chunk)) => {
                    assert!(
                        !chunk.is_empty() && chunk.len() <= ask && !short,
                        "{}",
                        chunk.len()
                    );
                    short = chunk.len() < ask;
                    received += chunk.len() as u64;
                    assert!(received <= IMAGE, "{received} bytes reached the sink");
                }
                Ok(None) => {
                    assert!(received > 0, "an empty image");
                    assert!(body.starts_with(magic), "that was not {format}");
                    break;
                }
                Err(error) => {
                    assert_clear(&error.to_string());
                    assert!(stream.next(ask).await.is_err(), "an end after a failure");
                    break;
                }
            }
        }
    });
}

/// A factory's answer to a schematic: two bytes of status, and a body.
pub fn schematic_answer(input: &[u8]) {
    let Some((status, body)) = input.split_first_chunk() else {
        return;
    };
    let Ok(status) = StatusCode::from_u16(u16::from_be_bytes(*status) % 1000) else {
        return;
    };
    match management::schematic_answer(status, body) {
        Ok(id) => assert!(!id.is_empty() && id.len() <= 256 && !id.contains(['/', '%', '?', ' '])),
        Err((_, reason)) => assert_clear(&reason),
    }
}
