//! Talos's own loader and validation judge what we put into user data, and the patches that we ask for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use omni_infra_provider::secret::Secret;
use omni_infra_provider::talos::join::JoinParams;
use omni_infra_provider::talos::patch::{nameservers, node_provider_id};
use serde::Deserialize;
use serde_json::{Value, json};

use super::dice::Dice;
use super::vectors::Vectors;

const INPUTS: usize = 150;

/// What Talos understood, or why it did not.
#[derive(Debug, PartialEq, Default, Deserialize)]
#[serde(default)]
struct Read {
    kinds: Vec<String>,
    api_url: String,
    events: String,
    logs: Vec<String>,
    nameservers: Vec<String>,
    provider_id: Value,
    error: String,
}

fn address(dice: &mut Dice) -> IpAddr {
    let mut groups = [0_u16; 8];
    for group in &mut groups {
        if dice.once_in(2) {
            *group = u16::try_from(dice.below(0x1_0000)).unwrap();
        }
    }
    if dice.once_in(2) {
        let [a, b, ..] = groups;
        return Ipv4Addr::from_bits(u32::from(a) << 16 | u32::from(b)).into();
    }
    Ipv6Addr::from(groups).into()
}

fn addresses(dice: &mut Dice) -> Vec<IpAddr> {
    let mut all = dice.some(3, address);
    // An unspecified one, or one twice, is the operator's mistake and not ours.
    all.retain(|address| !address.is_unspecified());
    all.dedup();
    all
}

#[tokio::test]
async fn talos_understands_our_user_data() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let mut texts = Vec::new();
    let mut meant = Vec::new();
    for _ in 0..INPUTS {
        let params = JoinParams {
            api_url: dice
                .pick(&[
                    "https://omni.example.com:8090/",
                    "grpc://10.0.0.1:8090",
                    "https://[2001:db8::1]:8090?a=b",
                ])
                .to_owned(),
            token: Secret::new(format!("w{}", dice.below(1000))),
            token_version: 2,
            events_port: dice.port(),
            logs_port: dice.port(),
            provider: "oxide".to_owned(),
            request: Some("talos-workers-x7f2qa".to_owned()),
            tunnel: dice.once_in(2),
        };
        let addresses = addresses(&mut dice);
        let mut text = params.documents().unwrap().expose().to_owned();
        let mut kinds = vec!["SideroLinkConfig", "EventSinkConfig", "KmsgLogConfig"];
        // As the daemon appends it.
        if let Some(document) = nameservers(&addresses) {
            text = format!("{text}---\n{document}");
            kinds.push("ResolverConfig");
        }
        texts.push(text);
        meant.push(Read {
            kinds: kinds.into_iter().map(str::to_owned).collect(),
            api_url: params.url().unwrap().expose().to_owned(),
            events: format!("[fdae:41e4:649b:9303::1]:{}", params.events_port),
            logs: vec![format!("tcp://[fdae:41e4:649b:9303::1]:{}", params.logs_port)],
            nameservers: addresses.iter().map(ToString::to_string).collect(),
            ..Read::default()
        });
    }
    let read: Vec<Read> = vectors.ask("configs", &texts).await;
    for ((text, read), meant) in texts.iter().zip(&read).zip(&meant) {
        assert_eq!(read, meant, "{text}\n{dice}");
    }
}

#[tokio::test]
async fn a_machine_with_our_patches_is_valid_and_has_what_they_say() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let mut questions = Vec::new();
    let mut meant = Vec::new();
    for _ in 0..INPUTS {
        let addresses = addresses(&mut dice);
        let id = match dice.below(3) {
            0 => format!("oxide://{}", dice.text(6)),
            _ => format!("oxide://0b7c3b0e-5f3c-4a6b-9d1a-{:012x}", dice.below(1 << 40)),
        };
        let mut patches = vec![node_provider_id(&id)];
        patches.extend(nameservers(&addresses));
        questions.push(json!({ "patches": patches, "control_plane": dice.once_in(2) }));
        meant.push((id, addresses.iter().map(ToString::to_string).collect::<Vec<_>>()));
    }
    let read: Vec<Read> = vectors.ask("patches", &questions).await;
    for ((question, read), (id, nameservers)) in questions.iter().zip(&read).zip(&meant) {
        assert_eq!(read.error, "", "{question}\n{dice}");
        assert_eq!(read.provider_id, json!(id), "{question}\n{dice}");
        assert_eq!(read.nameservers, *nameservers, "{question}\n{dice}");
    }
}

#[tokio::test]
async fn talos_does_not_nod_at_everything() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let texts = [
        nameservers(&[Ipv4Addr::LOCALHOST.into()])
            .unwrap()
            .replace("127.0.0.1", "nowhere"),
        node_provider_id("oxide://x").replace("extraConfig", "extraKonfig"),
    ];
    let read: Vec<Read> = vectors.ask("configs", &texts).await;
    let patches = texts.map(|text| json!({ "patches": [text] }));
    let patched: Vec<Read> = vectors.ask("patches", &patches).await;
    for read in read.iter().chain(&patched) {
        assert_ne!(read.error, "", "{read:?}");
    }
}
