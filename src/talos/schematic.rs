//! Decides what an image is made of: a request's wishes and its cloud's needs become one canonical schematic text.
//!
//! *Not here*: the schematic's ID is the factory's to give (an Enterprise factory adds an owner, which changes it). The hash of
//! our text is only a key under which the returned ID is remembered. Join parameters travel as user data wherever a platform reads
//! some; else they are kernel arguments here, which name no request, so that one image serves all machines. A text may hold the join
//! token, then, and `Debug` hides it.

use std::fmt::{self, Write as _};

use sha2::{Digest, Sha256};

use super::scalar::scalar;
use crate::cloud::BootProfile;
use crate::omni::kinds::MachineRequestSpec;

/// A schematic in the image factory's canonical form. It may hold the join token.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Schematic {
    yaml: String,
}

impl fmt::Debug for Schematic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schematic({})", self.input_hash())
    }
}

impl Schematic {
    /// The schematic of a request on a cloud: the request's kernel arguments sorted, then the cloud's own in their order; the
    /// request's extensions and those of the cloud that are not among them, sorted; META values and overlay as requested.
    ///
    /// # Errors
    ///
    /// A META key that does not fit into a byte, in a sentence for the operator.
    pub fn new(request: &MachineRequestSpec, boot: &BootProfile) -> Result<Self, String> {
        let mut kernel_args: Vec<&str> = request.kernel_args.iter().map(String::as_str).collect();
        kernel_args.sort_unstable();
        kernel_args.extend(boot.kernel_args.iter().map(String::as_str));
        // What the request names twice stays there twice: the Go library's text, and with it the factory's ID, has it so.
        let mut extensions: Vec<&str> = request.extensions.iter().map(String::as_str).collect();
        for extension in &boot.extensions {
            if !extensions.contains(&extension.as_str()) {
                extensions.push(extension);
            }
        }
        extensions.sort_unstable();
        if let Some((key, _)) = request.meta_values.iter().find(|(key, _)| *key > 0xff) {
            return Err(format!("META key {key} of the machine request is above 255"));
        }

        let mut customization = String::new();
        if !kernel_args.is_empty() {
            customization.push_str("    extraKernelArgs:\n");
            for arg in kernel_args {
                // Continuation lines stand below the text behind "- ".
                line(&mut customization, "        - ", arg, 10);
            }
        }
        if !request.meta_values.is_empty() {
            customization.push_str("    meta:\n");
            for (key, value) in &request.meta_values {
                let _ = writeln!(customization, "        - key: {key}");
                line(&mut customization, "          value: ", value, 12);
            }
        }
        if !extensions.is_empty() {
            customization.push_str("    systemExtensions:\n        officialExtensions:\n");
            for extension in extensions {
                line(&mut customization, "            - ", extension, 14);
            }
        }

        let mut yaml = String::new();
        if let Some((name, image)) = &request.overlay
            && !(name.is_empty() && image.is_empty())
        {
            yaml.push_str("overlay:\n");
            line(&mut yaml, "    image: ", image, 8);
            line(&mut yaml, "    name: ", name, 8);
        }
        if customization.is_empty() {
            yaml.push_str("customization: {}\n");
        } else {
            yaml.push_str("customization:\n");
            yaml.push_str(&customization);
        }
        Ok(Self { yaml })
    }

    /// The canonical text, to be registered.
    #[must_use]
    pub fn yaml(&self) -> &str {
        &self.yaml
    }

    /// Lower-case hex SHA-256 of the text. A factory without accounts gives this very ID; none is relied on to.
    #[must_use]
    pub fn input_hash(&self) -> String {
        hex::encode(Sha256::digest(self.yaml.as_bytes()))
    }
}

/// Appends one line, or several for a block scalar. A block that keeps its last empty lines brings their ends along.
fn line(yaml: &mut String, lead: &str, value: &str, indent: usize) {
    yaml.push_str(lead);
    yaml.push_str(&scalar(value, indent));
    yaml.push('\n');
}

#[cfg(test)]
mod tests {
    use super::Schematic;
    use crate::cloud::BootProfile;
    use crate::omni::kinds::MachineRequestSpec;

    fn boot(kernel_args: &[&str], extensions: &[&str]) -> BootProfile {
        BootProfile {
            platform: "nocloud",
            arch: "amd64",
            format: Some("raw.xz"),
            kernel_args: kernel_args.iter().map(ToString::to_string).collect(),
            extensions: extensions.iter().map(ToString::to_string).collect(),
            nameservers: Vec::new(),
        }
    }

    fn schematic(request: &MachineRequestSpec) -> Schematic {
        Schematic::new(request, &boot(&[], &[])).unwrap()
    }

    fn args(args: &[&str]) -> MachineRequestSpec {
        MachineRequestSpec {
            kernel_args: args.iter().map(ToString::to_string).collect(),
            ..MachineRequestSpec::default()
        }
    }

    #[test]
    fn the_factorys_own_vectors() {
        let empty = schematic(&MachineRequestSpec::default());
        assert_eq!(empty.yaml(), "customization: {}\n");
        assert_eq!(
            empty.input_hash(),
            "376567988ad370138ad8b2698212367b8edcb69b5fd68c80be1f2ec7d603b4ba"
        );

        // In the factory's test these two stand unsorted, as the cloud's own arguments do here.
        let kernel =
            Schematic::new(&MachineRequestSpec::default(), &boot(&["noapic", "nolapic"], &[])).unwrap();
        assert_eq!(
            kernel.input_hash(),
            "9cba8e32753f91a16c1837ab8abf356af021706ef284aef07380780177d9a06c"
        );

        let meta = schematic(&MachineRequestSpec {
            meta_values: vec![(10, "foo".into())],
            ..MachineRequestSpec::default()
        });
        assert_eq!(
            meta.input_hash(),
            "d308a2a5ee2277bed5fbaa104fcbc8d59122abfa737df987a95b4ca763459a7f"
        );

        let overlay = schematic(&MachineRequestSpec {
            overlay: Some(("rpi_generic".into(), "siderolabs/sbc-raspberrypi".into())),
            ..MachineRequestSpec::default()
        });
        assert_eq!(
            overlay.input_hash(),
            "ee21ef4a5ef808a9b7484cc0dda0f25075021691c8c09a276591eedb638ea1f9"
        );

        // The join arguments of the Go library's test, which we would never put here: URLs and brackets are written as Go does.
        let join = schematic(&args(&[
            "siderolink.api=http://127.0.0.1:8099?jointoken=v2%3AeyJleHRyYV9kYXRhIjp7Im9tbmkuc2lkZXJvLmRldi9pbmZyYS1\
             wcm92aWRlci1pZCI6InRlc3QifSwic2lnbmF0dXJlIjoiWTNpZ285V2xJSVZOWWpXZmgyWlg5NnpnWW5UQjlwWTI3ZEJaVnJwNDJ\
             MZz0ifQ%3D%3D",
            "talos.events.sink=[fdae:41e4:649b:9303::1]:8091",
            "talos.logging.kernel=tcp://[fdae:41e4:649b:9303::1]:8092",
        ]));
        assert_eq!(
            join.input_hash(),
            "4e2a2ec4368100c1b21d4fa7be47f3d38ddab9185f34fc187f82400b1e20da17"
        );
    }

    #[test]
    fn everything_in_its_place() {
        let request = MachineRequestSpec {
            kernel_args: vec!["z=1".into(), "a: b".into(), "-console".into()],
            extensions: vec![
                "siderolabs/util-linux-tools".into(),
                "siderolabs/amd-ucode".into(),
            ],
            meta_values: vec![(12, "machineLabels:\n    rack: 'a'\n".into()), (10, "yes".into())],
            ..MachineRequestSpec::default()
        };
        let boot = boot(
            &["-console", "console=ttyS0"],
            &["siderolabs/iscsi-tools", "siderolabs/amd-ucode"],
        );
        expect_test::expect![[r#"
            customization:
                extraKernelArgs:
                    - -console
                    - 'a: b'
                    - z=1
                    - -console
                    - console=ttyS0
                meta:
                    - key: 12
                      value: |
                        machineLabels:
                            rack: 'a'
                    - key: 10
                      value: "yes"
                systemExtensions:
                    officialExtensions:
                        - siderolabs/amd-ucode
                        - siderolabs/iscsi-tools
                        - siderolabs/util-linux-tools
        "#]]
        .assert_eq(Schematic::new(&request, &boot).unwrap().yaml());
    }

    #[test]
    fn a_meta_key_beyond_a_byte_is_refused() {
        let request = MachineRequestSpec {
            meta_values: vec![(256, String::new())],
            ..MachineRequestSpec::default()
        };
        assert_eq!(
            Schematic::new(&request, &boot(&[], &[])),
            Err("META key 256 of the machine request is above 255".to_owned())
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        use proptest::prelude::*;
        proptest!(|(values in proptest::collection::vec("[ -~\n\t:#'\"\u{e9}\u{2028}\u{1f600}-]{0,12}", 1..5))| {
            let request = MachineRequestSpec {
                meta_values: values.iter().map(|value| (10, value.clone())).collect(),
                ..MachineRequestSpec::default()
            };
            let schematic = Schematic::new(&request, &boot(&[], &[])).unwrap();
            let read: serde_json::Value = serde_saphyr::from_str(schematic.yaml()).unwrap();
            let read: Vec<&str> = read["customization"]["meta"]
                .as_array()
                .unwrap()
                .iter()
                .map(|item| item["value"].as_str().unwrap())
                .collect();
            prop_assert_eq!(read, values);
        });
    }
}
