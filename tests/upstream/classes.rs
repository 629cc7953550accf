//! Machine classes: Omni's validator with our schema, and our own reading.

use omni_infra_provider::backends::oxide::Oxide;
use omni_infra_provider::cloud::Cloud;
use omni_infra_provider::cloud::class::parse_class;
use serde::Deserialize;
use serde_json::{Value, json};

use super::dice::Dice;
use super::vectors::{Vectors, assert_none};

const INPUTS: usize = 4000;

/// What Omni finds.
#[derive(Debug, Deserialize)]
struct Omnis {
    /// The text is no YAML.
    yaml: String,
    /// The schema is not met: a line of heading, and one for each fault.
    schema: String,
    /// What the text says, where the schema is met.
    data: Value,
}

/// What no schema can say, or ours does not: faults that only we find.
const OURS_ALONE: &[&str] = &[
    // One field decides what another may be.
    "all interfaces of a machine must be in one VPC",
    "].size must be between 1 and 1023 GiB",
    // Go's expressions cannot exclude.
    "it must be a name, not an ID",
    // Formats are not asserted.
    "invalid IP address syntax",
    // 4.0 and 1e1 are integers of a schema, 010 is one of Go, and a disk's size has no end.
    "must be a whole number",
    // Omni looks at the first.
    "more than one YAML document",
];

/// What ours read although Omni refuses it: as the Go provider did before there was a schema, or in a scalar's plain sense.
const OMNIS_ALONE: &[&str] = &[
    "got null, want array",
    "got null, want boolean",
    "got boolean, want string",
    "got string, want integer",
    "got string, want boolean",
    "value must be one of 'amd_milan', 'amd_turin', 'amd_turin_v2'",
];

fn one_of(dice: &mut Dice, good: &[&str], odd: &[&str]) -> String {
    if dice.once_in(12) {
        dice.pick(odd).to_owned()
    } else {
        dice.pick(good).to_owned()
    }
}

/// Scalars that are not what they look like.
const ODD: &[&str] = &[
    "",
    "~",
    "null",
    "true",
    "yes",
    "no",
    "off",
    "1",
    "0",
    "-1",
    "\"2\"",
    "'3'",
    "4.0",
    "4.5",
    "1e1",
    "0x10",
    "0o7",
    "010",
    "0b1",
    "1_0",
    "+5",
    "254",
    "255",
    "1023",
    "1024",
    "1536",
    "1537",
    "65536",
    "4294967296",
    "9999999999999999999999",
    ".nan",
    ".inf",
    "-.inf",
    "abc",
    "\"\"",
    "''",
    "2026-01-02",
    "2026-01-02T03:04:05Z",
    "12:30",
    "[]",
    "{}",
    "[1]",
    "{a: 1}",
    "!!str 5",
    "!!int \"6\"",
    "<<",
    "|-\n  text",
    "é",
    "a b",
    "Talos",
    "*a",
    "&a 7",
    "@",
    "- 1",
    "v4",
    "local",
    "amd_milan",
    "amd_turinv2",
    "10.0.0.1",
    "0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11",
    "!!binary aGFsbG8=",
    "1.",
    ".5",
    "0.0",
    "-0",
    "1e999",
    "True",
    "NULL",
    "y",
];

fn entry(dice: &mut Dice, fields: &mut Vec<(String, String)>, name: &str, value: String) {
    let name = if dice.once_in(40) {
        dice.pick(&[
            "more", "Project", "memmory", "1", "~", "true", "\"cpus\"", "<<", "? cpus",
        ])
        .to_owned()
    } else {
        name.to_owned()
    };
    fields.push((name.clone(), value.clone()));
    if dice.once_in(60) {
        fields.push((name, value));
    }
}

fn flow(fields: &[(String, String)]) -> String {
    let members: Vec<String> = fields
        .iter()
        .map(|(name, value)| format!("{name}: {value}"))
        .collect();
    format!("{{{}}}", members.join(", "))
}

fn class(dice: &mut Dice) -> String {
    let mut fields = Vec::new();
    if !dice.once_in(20) {
        let value = one_of(
            dice,
            &["talos", "k8s-1", "0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11"],
            ODD,
        );
        entry(dice, &mut fields, "project", value);
    }
    for (name, good) in [
        ("cpus", &["1", "2", "254"][..]),
        ("memory", &["1", "8", "1536"]),
        ("boot_disk_size", &["2", "10", "1023"]),
        ("auto_restart_policy", &["never", "best_effort"]),
        ("cpu_platform", &["amd_milan", "amd_turin", "amd_turin_v2"]),
        ("enable_jumbo_frames", &["true", "false"]),
    ] {
        if dice.once_in(3) {
            let value = one_of(dice, good, ODD);
            entry(dice, &mut fields, name, value);
        }
    }
    for (name, good) in [
        (
            "anti_affinity_groups",
            &["spread", "a-1", "0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11"][..],
        ),
        ("nameservers", &["10.0.0.1", "'2001:db8::1'", "\"fe80::\""]),
    ] {
        if dice.once_in(3) {
            let items = dice.some(3, |dice| one_of(dice, good, ODD)).join(", ");
            let value = one_of(dice, &[&format!("[{items}]")], ODD);
            entry(dice, &mut fields, name, value);
        }
    }
    if dice.once_in(2) {
        let most = if dice.once_in(10) { 13 } else { 2 };
        let disks = dice.some(most, |dice| {
            let mut disk = Vec::new();
            let value = one_of(dice, &["distributed", "local"], ODD);
            if !dice.once_in(30) {
                entry(dice, &mut disk, "type", value);
            }
            let value = one_of(dice, &["1", "20", "1023", "1024"], ODD);
            if !dice.once_in(30) {
                entry(dice, &mut disk, "size", value);
            }
            flow(&disk)
        });
        let value = one_of(dice, &[&format!("[{}]", disks.join(", "))], ODD);
        entry(dice, &mut fields, "disks", value);
    }
    if !dice.once_in(20) {
        let most = if dice.once_in(10) { 10 } else { 2 };
        let interfaces = 1 + dice.below(most);
        let interfaces: Vec<String> = (0..interfaces)
            .map(|_| {
                let mut interface = Vec::new();
                for (name, good) in [
                    ("ip_config", &["v4", "v6", "dual_stack"][..]),
                    ("vpc_name", &["default", "default", "default", "other"]),
                    ("subnet_name", &["default", "s-1"]),
                ] {
                    let value = one_of(dice, good, ODD);
                    if !dice.once_in(40) {
                        entry(dice, &mut interface, name, value);
                    }
                }
                flow(&interface)
            })
            .collect();
        let value = one_of(dice, &[&format!("[{}]", interfaces.join(", "))], ODD);
        entry(dice, &mut fields, "network_interfaces", value);
    }
    let lines: Vec<String> = fields
        .iter()
        .map(|(name, value)| format!("{name}: {value}\n"))
        .collect();
    match dice.below(30) {
        0 => flow(&fields),
        1 => format!("---\n{}", lines.concat()),
        2 => format!("{}---\n", lines.concat()),
        3 => format!("{}---\na: 1\n", lines.concat()),
        4 => dice
            .pick(&["", "~", "[]", "text", "# nothing", "{", "\t", "---\n", "{}"])
            .to_owned(),
        _ => lines.concat(),
    }
}

/// Our reading: what the text says, or every fault.
fn ours(text: &str) -> Result<Value, Vec<String>> {
    let class = parse_class::<<Oxide as Cloud>::Class>(text)?;
    match Oxide::validate(&class) {
        faults if faults.is_empty() => Ok(serde_json::to_value(&class).unwrap()),
        faults => Err(faults),
    }
}

/// The difference between Omni's reading and ours, if there is one.
fn difference(omni: &Omnis, ours: &Result<Value, Vec<String>>) -> Option<String> {
    let known = |list: &[&str], fault: &str| list.iter().any(|known| fault.contains(known));
    let faults: Vec<&str> = match omni.yaml.as_str() {
        "" => omni.schema.lines().skip(1).collect(),
        fault => vec![fault],
    };
    match ours {
        // Omni fills in no defaults.
        Ok(ours) if faults.is_empty() => {
            let said = omni.data.as_object().unwrap();
            said.iter()
                .find(|(name, value)| ours[name.as_str()] != **value)
                .map(|(name, value)| format!("{name} is {value}, ours {}", ours[name.as_str()]))
        }
        Ok(_) => {
            (!faults.iter().all(|fault| known(OMNIS_ALONE, fault))).then(|| format!("only Omni: {faults:?}"))
        }
        Err(ours) if faults.is_empty() => {
            (!ours.iter().all(|fault| known(OURS_ALONE, fault))).then(|| format!("only ours: {ours:?}"))
        }
        Err(_) => None,
    }
}

#[tokio::test]
async fn omnis_validator_takes_our_schema_and_agrees_with_our_reading() {
    let Some(mut vectors) = Vectors::start() else {
        return;
    };
    let mut dice = Dice::new();
    let inputs: Vec<String> = (0..INPUTS).map(|_| class(&mut dice)).collect();
    let (_, schema, _) = crate::command_line::run(&["schema"], &[], "");
    let omni: Vec<Omnis> = vectors
        .tell(json!({ "do": "classes", "schema": schema, "inputs": inputs }))
        .await;
    let mut differences = Vec::new();
    let mut good = 0;
    for (text, omni) in inputs.iter().zip(&omni) {
        let ours = ours(text);
        good += usize::from(ours.is_ok());
        if let Some(difference) = difference(omni, &ours) {
            differences.push(format!("{text}    {difference}"));
        }
    }
    assert!(
        (INPUTS / 20..INPUTS / 2).contains(&good),
        "{good} good classes ({dice})"
    );
    assert_none(&differences, &dice);
}
