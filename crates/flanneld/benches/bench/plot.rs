//! The table as JSON, and as a picture.

use std::path::Path;

use serde_json::{Value, json};

use crate::scale::Row;

/// The picture's size, and its margins to the left and below, in pixels.
const SIZE: (f64, f64) = (760.0, 460.0);
const MARGIN: (f64, f64) = (70.0, 50.0);
const COLOURS: [&str; 5] = ["#1b6ca8", "#c0392b", "#27865a", "#8e5ea2", "#b7791f"];

/// Writes `scale.json` and `start.svg`.
pub(crate) fn write(folder: &Path, rows: &[Row], peers: &[Value]) {
    std::fs::create_dir_all(folder).unwrap();
    let machine = json!({
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim(),
        "processors": std::thread::available_parallelism().unwrap().get(),
        "model": model(),
    });
    let document = json!({ "machine": machine, "rows": rows.iter().map(Row::json).collect::<Vec<_>>(), "peer": peers });
    std::fs::write(folder.join("scale.json"), serde_json::to_string_pretty(&document).unwrap() + "\n").unwrap();
    std::fs::write(folder.join("start.svg"), start(rows, &format!("{}, {} processors", machine["kernel"], machine["processors"]))).unwrap();
}

fn model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or(String::new(), |line| line.trim_start_matches([' ', '\t', ':']).to_owned())
}

/// Start to all programmed over the number of leases, both logarithmic: a line a backend, and a dashed one for the kernel's own
/// part.
#[expect(clippy::cast_precision_loss, reason = "numbers of leases are small")]
fn start(rows: &[Row], machine: &str) -> String {
    let x = |leases: f64| MARGIN.0 + (leases / 100.0).log10() / 2.4 * (SIZE.0 - MARGIN.0 - 200.0);
    let y = |millis: f64| SIZE.1 - MARGIN.1 - millis.max(0.5).log10().mul_add(1.0, 0.3) / 3.6 * (SIZE.1 - MARGIN.1 - 40.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{}\" y=\"20\">Start of flanneld until all leases are in the kernel, ms (dashed: the kernel alone). Linux {machine}</text>\n",
        SIZE.0, SIZE.1, MARGIN.0
    );
    for millis in [1.0, 10.0, 100.0, 1_000.0] {
        svg += &format!(
            "<path d=\"M{} {:.0}H{}\" stroke=\"#ddd\"/><text x=\"20\" y=\"{:.0}\">{millis}</text>\n",
            MARGIN.0,
            y(millis),
            SIZE.0 - 200.0,
            y(millis) + 4.0
        );
    }
    for leases in [100.0, 1_000.0, 10_000.0] {
        svg += &format!("<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\">{leases}</text>\n", x(leases), SIZE.1 - 25.0);
    }
    let mut names: Vec<&str> = rows.iter().map(|row| row.backend.as_str()).collect();
    names.dedup();
    for (name, colour) in names.iter().zip(COLOURS.iter().cycle()) {
        let of: Vec<&Row> = rows.iter().filter(|row| row.backend == *name).collect();
        let line = |value: fn(&Row) -> f64| -> String {
            let points: Vec<String> = of.iter().map(|row| format!("{:.1} {:.1}", x(row.leases as f64), y(value(row)))).collect();
            format!("M{}", points.join("L"))
        };
        svg += &format!("<path d=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n", line(|row| row.start));
        svg += &format!("<path d=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-dasharray=\"4 4\"/>\n", line(|row| row.raw_start));
        let place = names.iter().position(|other| other == name).unwrap_or(0) as f64;
        svg += &format!("<text x=\"{:.0}\" y=\"{:.0}\" fill=\"{colour}\">{name}</text>\n", SIZE.0 - 190.0, place.mul_add(20.0, 60.0));
    }
    svg + "</svg>\n"
}
