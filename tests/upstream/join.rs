//! Join tokens, kernel arguments and documents: upstream's bytes and ours.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use omni_infra_provider::secret::Secret;
use omni_infra_provider::talos::join::{JoinError, JoinParams};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::dice::Dice;
use super::vectors::{Vectors, assert_none};

const INPUTS: usize = 3000;

#[derive(Debug, Clone, Serialize)]
struct Input {
    url: String,
    token: String,
    version: String,
    provider: String,
    request: Option<String>,
    tunnel: bool,
    events: i32,
    logs: i32,
}

#[derive(Debug, PartialEq, Eq, Deserialize, Default)]
#[serde(default)]
struct Joined {
    kernel_args: Vec<String>,
    documents: String,
    error: String,
}

/// A URL at which an Omni might say that it is.
fn ordinary_url(dice: &mut Dice) -> String {
    let scheme = dice.pick(&["https", "http", "grpc"]);
    let host = dice.pick(&[
        "omni.example.com",
        "Omni.Example.COM.",
        "omni_1",
        "10.0.0.1",
        "[2001:db8::1]",
        "a--b",
    ]);
    let port = dice.pick(&["", ":", ":8090", ":443", ":65535"]);
    let path = dice.pick(&[
        "",
        "",
        "/",
        "/a/b",
        "/a//b/",
        "/a/../b",
        "/a%20b",
        "/%2f%2F",
        "/a;b=c:d",
        "/[x]'~!*()",
    ]);
    let mut url = format!("{scheme}://{host}{port}{path}");
    if dice.once_in(3) {
        let member = |dice: &mut Dice| {
            let key = dice.pick(&["a", "z", "grpc_tunnel", "", "ü", "a b", "%61", "a[]", "~", "<"]);
            let value = dice.pick(&[
                "", "=", "=1", "=b+c", "=%2F", "==", "=ü", "=a b", "=%c3%BC", "=:", "='\"",
            ]);
            format!("{key}{value}")
        };
        url = format!("{url}?{}", dice.some(3, member).join(dice.pick(&["&", "&&"])));
    }
    url + dice.pick(&["", "", "", "#", "#frag", "#a:", "#%41%2f", "#?[x]"])
}

/// A URL at which no Omni should say that it is.
fn odd_url(dice: &mut Dice) -> String {
    let url = ordinary_url(dice);
    let piece = dice.pick(&[
        "HTTPS://",
        "://",
        "user@",
        "user:p%20w@",
        "ü",
        " ",
        ":",
        "/",
        "[",
        "]",
        "%",
        "%zz",
        "%ff",
        "%25eth0",
        ";",
        "?",
        "#",
        "\"",
        "|",
        "\n",
        "\u{7f}",
        "jointoken=old",
        "&",
        "1",
        "",
    ]);
    let middle = dice.below(url.len() + 1);
    let middle = url.floor_char_boundary(middle);
    let (start, end) = url.split_at(middle);
    if dice.once_in(8) {
        return piece.to_owned() + end;
    }
    format!("{start}{piece}{end}")
}

fn token(dice: &mut Dice) -> String {
    match dice.below(8) {
        0 => dice.text(8),
        1 => {
            let json = dice.pick(&[
                r#"{"extra_data":{"a":"b"},"signature":"YQ=="}"#,
                r#"{"signature":"YQ"}"#,
                "{}",
                "[]",
                "",
                r#"{"extra_data":{"a":1}}"#,
                r#"{"more":1}"#,
                "{} {}",
            ]);
            format!("{}{}", dice.pick(&["v1:", "v2:"]), STANDARD.encode(json))
        }
        2 => format!("{}{}", dice.pick(&["v1:", "v2:", "v3:"]), dice.text(3)),
        _ => "w7uVuW3zbVKIYQuzEcyetAHeYMeo5q2L9RvkAVfCfSCD".to_owned(),
    }
}

fn input(dice: &mut Dice, url: fn(&mut Dice) -> String) -> Input {
    Input {
        url: url(dice),
        token: token(dice),
        version: dice.pick(&["1", "2"]).to_owned(),
        provider: dice.pick(&["oxide", "a", "x-1"]).to_owned(),
        request: dice
            .once_in(2)
            .then(|| dice.pick(&["talos-workers-x7f2qa", "r"]).to_owned()),
        tunnel: dice.once_in(2),
        events: dice.port(),
        logs: dice.port(),
    }
}

fn params(input: &Input) -> JoinParams {
    JoinParams {
        api_url: input.url.clone(),
        token: Secret::new(&input.token),
        token_version: input.version.parse().unwrap(),
        events_port: input.events,
        logs_port: input.logs,
        provider: input.provider.clone(),
        request: input.request.clone(),
        tunnel: input.tunnel,
    }
}

/// What ours render; an error as upstream's program tells of it.
fn ours(input: &Input) -> Joined {
    let render = || {
        let params = params(input);
        // Ours make no arguments that name a request: an image would be for one machine alone.
        let args = match &params.request {
            None => params.kernel_args()?,
            Some(_) => Vec::new(),
        };
        Ok::<_, JoinError>(Joined {
            kernel_args: args.iter().map(|arg| arg.expose().to_owned()).collect(),
            documents: params.documents()?.expose().to_owned(),
            error: String::new(),
        })
    };
    render().unwrap_or_else(|error| Joined {
        error: error.to_string(),
        ..Joined::default()
    })
}

/// Compares what upstream's functions and ours make of generated inputs.
async fn compare(url: fn(&mut Dice) -> String, may_refuse: bool) {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let inputs: Vec<Input> = (0..INPUTS).map(|_| input(&mut dice, url)).collect();
    let mut upstream: Vec<Joined> = vectors.ask("join", &inputs).await;
    let mut differences = Vec::new();
    for (input, upstream) in inputs.iter().zip(&mut upstream) {
        let ours = ours(input);
        if input.request.is_some() {
            upstream.kernel_args.clear();
        }
        let same = match (upstream.error.as_str(), ours.error.as_str()) {
            ("", "") => *upstream == ours,
            ("", _) => may_refuse,
            (_, ours) => !ours.is_empty(),
        };
        if !same {
            differences.push(format!(
                "{input:?}\n    upstream {upstream:?}\n    ours     {ours:?}"
            ));
        }
    }
    assert_none(&differences, &dice);
}

#[tokio::test]
async fn join_parameters_are_upstreams_to_the_byte() {
    compare(ordinary_url, false).await;
}

#[tokio::test]
async fn of_odd_urls_join_parameters_are_upstreams_to_the_byte_or_refused() {
    compare(odd_url, true).await;
}

#[tokio::test]
async fn join_tokens_are_upstreams_to_the_byte() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let inputs: Vec<(String, u8, String, Option<String>)> = (0..INPUTS)
        .map(|_| {
            (
                format!("t{}", dice.text(8)),
                if dice.once_in(2) { 1 } else { 2 },
                dice.text(8),
                if dice.once_in(2) { Some(dice.text(8)) } else { None },
            )
        })
        .collect();
    #[derive(Deserialize)]
    struct Token {
        token: String,
        error: String,
    }
    let asked: Vec<_> = inputs
        .iter()
        .map(|(token, version, provider, request)| {
            let mut extra = BTreeMap::from([("omni.sidero.dev/infra-provider-id", provider)]);
            if let Some(request) = request {
                extra.insert("omni.sidero.dev/machine-request", request);
            }
            json!({ "token": token, "version": version.to_string(), "extra": extra })
        })
        .collect();
    let upstream: Vec<Token> = vectors.ask("token", &asked).await;
    let mut differences = Vec::new();
    for ((token, version, provider, request), upstream) in inputs.iter().zip(&upstream) {
        let params = JoinParams {
            api_url: String::new(),
            token: Secret::new(token),
            token_version: *version,
            events_port: 1,
            logs_port: 1,
            provider: provider.clone(),
            request: request.clone(),
            tunnel: false,
        };
        let ours = params.token().unwrap();
        if !upstream.error.is_empty() || ours.expose() != upstream.token {
            differences.push(format!(
                "{token:?} {provider:?} {request:?}: {} {:?}, ours {:?}",
                upstream.error,
                upstream.token,
                ours.expose()
            ));
        }
    }
    assert_none(&differences, &dice);
}
