//! Schematics: upstream's bytes and ours.

use omni_infra_provider::cloud::BootProfile;
use omni_infra_provider::omni::kinds::MachineRequestSpec;
use omni_infra_provider::talos::schematic::Schematic;
use serde::Deserialize;
use serde_json::{Value, json};

use super::dice::Dice;
use super::vectors::{Vectors, assert_none};

const INPUTS: usize = 3000;

/// What upstream's library makes of a request.
#[derive(Debug, Deserialize)]
struct Upstreams {
    yaml: String,
    id: String,
    error: String,
    /// Whether the factory reads that text back as what was written.
    faithful: bool,
}

/// What the factory reads in a text of ours, in the words of its Go type.
#[derive(Debug, Deserialize)]
struct Read {
    schematic: Value,
    error: String,
}

fn request(dice: &mut Dice) -> (MachineRequestSpec, BootProfile) {
    let text = |dice: &mut Dice| {
        if dice.once_in(5) {
            dice.words()
        } else {
            dice.text(6)
        }
    };
    let extension = |dice: &mut Dice| {
        if dice.once_in(2) {
            dice.pick(&["siderolabs/amd-ucode", "siderolabs/iscsi-tools"])
                .to_owned()
        } else {
            text(dice)
        }
    };
    let request = MachineRequestSpec {
        kernel_args: dice.some(4, text),
        meta_values: dice.some(3, |dice| (u32::try_from(dice.below(256)).unwrap(), text(dice))),
        extensions: dice.some(3, extension),
        overlay: dice.once_in(3).then(|| (text(dice), text(dice))),
        ..MachineRequestSpec::default()
    };
    let boot = BootProfile {
        platform: "nocloud",
        arch: "amd64",
        format: Some("raw.xz"),
        kernel_args: dice.some(3, text),
        extensions: dice.some(3, extension),
        nameservers: Vec::new(),
    };
    (request, boot)
}

/// A request as upstream's program takes it.
fn asked(request: &MachineRequestSpec, boot: &BootProfile) -> Value {
    let meta = request.meta_values.iter();
    let meta: Vec<Value> = meta
        .map(|(key, value)| json!({ "key": key, "value": value }))
        .collect();
    let overlay = request.overlay.as_ref();
    json!({
        "kernel_args": request.kernel_args,
        "meta": meta,
        "extensions": request.extensions,
        "overlay": overlay.map(|(name, image)| json!({ "name": name, "image": image })),
        "cloud_kernel_args": boot.kernel_args,
        "cloud_extensions": boot.extensions,
    })
}

/// Text that upstream's library does not always read back as what it wrote, so that ours writes it in another way.
fn is_special(text: &str) -> bool {
    text.contains(['\u{2028}', '\u{2029}'])
        || text.contains('\n') && text.trim_start_matches('\n').starts_with([' ', '\t'])
}

fn texts<'a>(request: &'a MachineRequestSpec, boot: &'a BootProfile) -> impl Iterator<Item = &'a str> {
    let overlay = request.overlay.iter().flat_map(|(name, image)| [name, image]);
    let meta = request.meta_values.iter().map(|(_, value)| value);
    let args = request.kernel_args.iter().chain(&boot.kernel_args);
    let extensions = request.extensions.iter().chain(&boot.extensions);
    args.chain(extensions)
        .chain(meta)
        .chain(overlay)
        .map(String::as_str)
}

/// What the factory has to read: all that was asked for.
fn meant(request: &MachineRequestSpec, boot: &BootProfile) -> Value {
    let mut kernel_args = request.kernel_args.clone();
    kernel_args.sort_unstable();
    kernel_args.extend(boot.kernel_args.iter().cloned());
    let mut extensions = request.extensions.clone();
    for extension in &boot.extensions {
        if !extensions.contains(extension) {
            extensions.push(extension.clone());
        }
    }
    extensions.sort_unstable();
    let meta = request.meta_values.iter();
    let meta: Vec<Value> = meta
        .map(|(key, value)| json!({ "Key": key, "Value": value }))
        .collect();
    let (name, image) = request.overlay.clone().unwrap_or_default();
    json!({ "args": kernel_args, "extensions": extensions, "meta": meta, "name": name, "image": image })
}

fn understood(schematic: &Value) -> Value {
    let list = |value: &Value| if value.is_null() { json!([]) } else { value.clone() };
    let customization = &schematic["Customization"];
    json!({
        "args": list(&customization["ExtraKernelArgs"]),
        "extensions": list(&customization["SystemExtensions"]["OfficialExtensions"]),
        "meta": list(&customization["Meta"]),
        "name": schematic["Overlay"]["Name"],
        "image": schematic["Overlay"]["Image"],
    })
}

#[tokio::test]
async fn schematics_are_upstreams_to_the_byte() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let inputs: Vec<_> = (0..INPUTS).map(|_| request(&mut dice)).collect();
    let questions: Vec<Value> = inputs
        .iter()
        .map(|(request, boot)| asked(request, boot))
        .collect();
    let upstream: Vec<Upstreams> = vectors.ask("schematic", &questions).await;
    let mut differences = Vec::new();
    for ((request, boot), upstream) in inputs.iter().zip(&upstream) {
        assert_eq!(upstream.error, "");
        let ours = Schematic::new(request, boot).unwrap();
        let same = ours.yaml() == upstream.yaml && ours.input_hash() == upstream.id;
        if !same && upstream.faithful && !texts(request, boot).any(is_special) {
            differences.push(format!(
                "--- upstream\n{}--- ours\n{}",
                upstream.yaml,
                ours.yaml()
            ));
        }
    }
    assert_none(&differences, &dice);
}

#[tokio::test]
async fn the_factory_reads_in_our_schematics_what_was_asked_for() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let inputs: Vec<_> = (0..INPUTS).map(|_| request(&mut dice)).collect();
    let ours: Vec<Schematic> = inputs
        .iter()
        .map(|(request, boot)| Schematic::new(request, boot).unwrap())
        .collect();
    let texts: Vec<&str> = ours.iter().map(Schematic::yaml).collect();
    let read: Vec<Read> = vectors.ask("read schematics", &texts).await;
    let mut differences = Vec::new();
    for (((request, boot), text), read) in inputs.iter().zip(&texts).zip(&read) {
        let (meant, understood) = (meant(request, boot), understood(&read.schematic));
        if !read.error.is_empty() || meant != understood {
            differences.push(format!("{text}meant {meant}\nread  {understood} {}", read.error));
        }
    }
    assert_none(&differences, &dice);
}
