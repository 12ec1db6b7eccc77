// What Kata's Rust loader makes of a configuration file and its drop-ins, as JSON.
use kata_types::config::{QemuConfig, TomlConfig};
use std::sync::Arc;

fn main() {
    let path = std::env::args().nth(1).expect("the configuration file");
    kata_types::config::hypervisor::register_hypervisor_plugin("qemu", Arc::new(QemuConfig::new()));
    let loaded = TomlConfig::load_from_file(&path).and_then(|(config, _)| {
        config.validate()?;
        Ok(config)
    });
    match loaded {
        Ok(config) => println!("{}", serde_json::to_string(&config).expect("JSON")),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}
