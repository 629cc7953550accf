//! `validate`: is a machine class good? Answered from the file alone.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;

use super::{ClassRules, CloudName, complain, print};
use crate::cloud::class::did_you_mean;
use crate::words::one_line;

/// The kinds of Omni resources that hold provider data, and the path to it.
const MACHINE_CLASS: &str = "MachineClasses.omni.sidero.dev";
const REQUEST_SET: &str = "MachineRequestSets.omni.sidero.dev";
/// What Omni knows in the `autoprovision` part of a machine class.
const AUTO_PROVISION: [&str; 5] = [
    "providerid",
    "kernelargs",
    "metavalues",
    "providerdata",
    "grpctunnel",
];
/// Most characters of one fault: it may quote what stands in the file.
const FAULT_CHARS: usize = 1000;
/// Omni's own limits on the kernel arguments of a class.
const MAX_KERNEL_ARGS: usize = 64;
/// In bytes.
const MAX_KERNEL_ARG: usize = 256;

#[derive(Debug, clap::Args)]
pub(super) struct ValidateArgs {
    /// Machine classes as `omnictl apply` takes them, or provider data alone; `-` for standard input.
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// The cloud that the classes are for.
    #[arg(long, value_enum, default_value_t = CloudName::DEFAULT)]
    cloud: CloudName,
}

pub(super) fn validate(arguments: &ValidateArgs) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for file in &arguments.files {
        let name = file.display();
        match read(file).map(|text| faults(&text, &arguments.cloud.class())) {
            Ok(faults) if faults.is_empty() => print(format_args!("{name}: good\n")),
            Ok(faults) => {
                code = ExitCode::FAILURE;
                for fault in faults {
                    complain(format_args!("{name}: {}", one_line(&fault, FAULT_CHARS)));
                }
            }
            Err(error) => {
                code = ExitCode::FAILURE;
                complain(format_args!("{name}: cannot be read: {error}"));
            }
        }
    }
    code
}

fn read(file: &Path) -> std::io::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().lock().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(file)
}

/// One sentence for each fault of a file.
fn faults(text: &str, rules: &ClassRules) -> Vec<String> {
    let Ok(documents) = serde_saphyr::from_multiple::<Value>(text) else {
        // The rules say what is wrong with it, and where.
        return (rules.faults)(text);
    };
    let is_resource = |document: &Value| document.get("metadata").is_some() && document.get("spec").is_some();
    if !documents.iter().any(is_resource) {
        return (rules.faults)(text);
    }
    let mut faults = Vec::new();
    let mut seen = false;
    for document in &documents {
        let kind = document
            .pointer("/metadata/type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let id = document
            .pointer("/metadata/id")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let of_resource = match kind {
            MACHINE_CLASS => class_faults(document, rules),
            REQUEST_SET => data_faults(document.pointer("/spec/providerdata"), rules),
            _ => continue,
        };
        seen = true;
        faults.extend(of_resource.into_iter().map(|fault| format!("{id}: {fault}")));
    }
    if !seen {
        faults.push(format!("has no resource of type {MACHINE_CLASS}"));
    }
    faults
}

fn class_faults(class: &Value, rules: &ClassRules) -> Vec<String> {
    let Some(Value::Object(provision)) = class.pointer("/spec/autoprovision") else {
        return vec!["the class has no `autoprovision`: no provider makes its machines".to_owned()];
    };
    let mut faults: Vec<String> = provision
        .keys()
        .filter(|key| !AUTO_PROVISION.contains(&key.as_str()))
        .map(|key| {
            let hint = did_you_mean(key, AUTO_PROVISION).map(|hint| format!(": did you mean `{hint}`?"));
            format!("unknown field `autoprovision.{key}`{}", hint.unwrap_or_default())
        })
        .collect();
    if provision
        .get("providerid")
        .and_then(Value::as_str)
        .is_none_or(str::is_empty)
    {
        faults.push("`autoprovision.providerid` is missing".to_owned());
    }
    if let Some(Value::Array(args)) = provision.get("kernelargs") {
        if args.len() > MAX_KERNEL_ARGS {
            faults.push(format!(
                "Omni takes at most {MAX_KERNEL_ARGS} kernel arguments, not {}",
                args.len()
            ));
        }
        let too_long = args
            .iter()
            .filter_map(Value::as_str)
            .filter(|arg| arg.len() > MAX_KERNEL_ARG);
        faults.extend(too_long.map(|arg| {
            format!(
                "a kernel argument has {} bytes, Omni takes at most {MAX_KERNEL_ARG}",
                arg.len()
            )
        }));
    }
    faults.extend(data_faults(provision.get("providerdata"), rules));
    faults
}

fn data_faults(data: Option<&Value>, rules: &ClassRules) -> Vec<String> {
    match data {
        None | Some(Value::Null) => (rules.faults)(""),
        Some(Value::String(text)) => (rules.faults)(text),
        Some(_) => vec!["`providerdata` must be text: write `providerdata: |` and indent it".to_owned()],
    }
    .into_iter()
    .map(|fault| format!("provider data: {fault}"))
    .collect()
}
