//! `tersor info`: this build, this machine, and what was measured of it.

use anyhow::Result;
use serde::Serialize;
use tersor_cpu::Level;
use tersor_runtime::device::{self, DeviceInfo};
use tersor_runtime::residency::MachineProfile;

use crate::machine;
use crate::options::{default_threads, thread_count};
use crate::output::table::Table;
use crate::output::{self, units};

/// Show this build, this machine and its measured profile
///
/// The profile is what `--strategy auto` decides by. It is measured once (a few seconds) and kept in the user's cache directory.
#[derive(clap::Args)]
pub struct Args {
    /// Threads that the profile is for [default: all cores]
    #[arg(long, value_name = "N", value_parser = thread_count)]
    threads: Option<usize>,
    /// SIMD level that the profile is for [default: the best of this machine]
    #[arg(long, value_name = "LEVEL")]
    level: Option<Level>,
    /// Measure again
    #[arg(long)]
    refresh: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    cpu: String,
    level: String,
    levels_available: Vec<String>,
    cores: usize,
    memory_bytes: u64,
    devices: Vec<DeviceInfo>,
    profile_file: String,
    profile: MachineProfile,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let level = args.level.unwrap_or_else(Level::best);
    let threads = args.threads.unwrap_or_else(default_threads);
    let directory = machine::cache_dir();
    let kept = if args.refresh { None } else { MachineProfile::load(&directory, level, threads) };
    let profile = match kept {
        Some(profile) => profile,
        None => {
            let profile = MachineProfile::measure(level, threads)?;
            if let Err(error) = profile.store(&directory) {
                eprintln!("the profile is not kept: {}: {error}", directory.display());
            }
            profile
        }
    };
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        cpu: machine::cpu_name(),
        level: Level::best().to_string(),
        levels_available: Level::available().iter().map(Level::to_string).collect(),
        cores: default_threads(),
        memory_bytes: machine::memory_bytes(),
        devices: device::list(),
        profile_file: MachineProfile::path(&directory, level, threads).display().to_string(),
        profile,
    };
    if args.json { output::json(&report) } else { output::text(&render(&report)) }
}

fn render(report: &Report) -> String {
    let profile = &report.profile;
    let devices: Vec<String> =
        report.devices.iter().map(|info| format!("{}, {}, {} memory", info.device, info.name, units::bytes(info.memory_bytes))).collect();
    let mut text = format!(
        "tersor {}\n{}, {} cores, {} memory\nlevels: {} (best: {}); devices: {}\n\nprofile of {} threads at {}, measured in {}: {}\n",
        report.version,
        report.cpu,
        report.cores,
        units::bytes(report.memory_bytes),
        report.levels_available.join(", "),
        report.level,
        if devices.is_empty() { "only the CPU".to_owned() } else { devices.join("; ") },
        profile.threads,
        profile.level,
        units::seconds(profile.measured_seconds),
        report.profile_file
    );
    let read: Vec<String> =
        profile.read_bytes_per_second.iter().map(|(threads, rate)| format!("{} GB/s with {threads}", units::digits3(rate / 1e9))).collect();
    text += &format!("read bandwidth by threads: {}\n\n", read.join(", "));
    let billions = |rate: f64| units::digits3(rate / 1e9);
    let mut table = Table::new(&["form", ">bpw", ">GEMV G weights/s", ">decode G weights/s", ">G MACs/s"]);
    for plain in &profile.plain {
        let name = format!("decoded, {} bit", plain.bits);
        table.row([name, plain.bits.to_string(), billions(plain.weights_per_second), "-".into(), billions(plain.macs_per_second)]);
    }
    for codec in &profile.codecs {
        table.row([
            codec.codec.clone(),
            format!("{:.2}", codec.sample_bpw),
            billions(codec.fused_weights_per_second),
            billions(codec.decode_weights_per_second),
            billions(codec.macs_per_second),
        ]);
    }
    text + &table.render()
}
