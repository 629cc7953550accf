#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| omni_infra_provider_fuzz::service_account_key(input));
