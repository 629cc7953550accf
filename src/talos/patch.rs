//! Decides what our config patches say, and whether two of them say the same.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::scalar::scalar;

/// The Talos document that makes a machine ask these nameservers; `None` for none. It stands beside the join
/// documents in the user data, and as a patch it keeps a machine's nameservers once it has joined.
///
/// Shape: <https://docs.siderolabs.com/talos/v1.12/reference/configuration/network/resolverconfig>
#[must_use]
pub fn nameservers(addresses: &[IpAddr]) -> Option<String> {
    if addresses.is_empty() {
        return None;
    }
    let mut yaml = String::from("apiVersion: v1alpha1\nkind: ResolverConfig\nnameservers:\n");
    for address in addresses {
        // An IPv6 address can look like a number in base sixty, or end in a colon. Writing to a string cannot
        // fail.
        let _ = writeln!(yaml, "    - address: {}", scalar(&address.to_string(), 8));
    }
    Some(yaml)
}

/// The patch that tells the kubelet its node provider ID, for example `oxide://<uuid>`. The Go provider's
/// shape.
#[must_use]
pub fn node_provider_id(id: &str) -> String {
    format!(
        "machine:\n    kubelet:\n        extraConfig:\n            providerID: {}\n",
        scalar(id, 16)
    )
}

/// Whether two patches say the same, however they are formatted. Text that is no YAML is only equal to
/// itself.
#[must_use]
pub fn same(one: &str, other: &str) -> bool {
    let documents = |text: &str| serde_saphyr::from_multiple::<serde_json::Value>(text).ok();
    one == other
        || documents(one)
            .zip(documents(other))
            .is_some_and(|(one, other)| one == other)
}

#[cfg(test)]
mod tests {
    use super::{nameservers, node_provider_id, same};

    #[test]
    fn nameservers_are_a_resolver_document() {
        assert_eq!(nameservers(&[]), None);
        let addresses = ["10.0.0.1", "2001:4860:4860::8888", "fe80::", "1:2:3:4:5:6:7:8"]
            .map(|address| address.parse().unwrap());
        expect_test::expect![[r#"
            apiVersion: v1alpha1
            kind: ResolverConfig
            nameservers:
                - address: 10.0.0.1
                - address: 2001:4860:4860::8888
                - address: 'fe80::'
                - address: "1:2:3:4:5:6:7:8"
        "#]]
        .assert_eq(&nameservers(&addresses).unwrap());
    }

    #[test]
    fn the_kubelet_learns_its_provider_id() {
        expect_test::expect![[r#"
            machine:
                kubelet:
                    extraConfig:
                        providerID: oxide://0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11
        "#]]
        .assert_eq(&node_provider_id("oxide://0b7c3b0e-5f3c-4a6b-9d1a-1f1b9b0e7a11"));
    }

    #[test]
    fn formatting_makes_no_difference() {
        let ours = node_provider_id("oxide://x");
        assert!(same(
            &ours,
            "machine: {kubelet: {extraConfig: {providerID: 'oxide://x'}}}"
        ));
        assert!(same("a: 1\n---\nb: 2\n", "---\na: 1\n---\nb:   2\n"));
        assert!(!same(&ours, &node_provider_id("oxide://y")));
        assert!(!same("a: 1\n---\nb: 2\n", "a: 1\n"));
        assert!(same("{", "{"));
        assert!(!same("{", "a: 1"));
        assert!(!same("{", "}"));
    }
}
