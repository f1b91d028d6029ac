//! One SVG: bits per weight against entropy, a point for every coded tensor. The line is the entropy itself, so that the height of a
//! point above it is what the tensor's coding costs beyond the bound.

use std::fmt::Write;

/// One tensor of the plot; both figures in bits per weight.
pub struct Point {
    /// Tensor name, shown when pointed at.
    pub name: String,
    /// Legend entry it belongs to, such as `attention`.
    pub class: &'static str,
    /// Empirical entropy of its symbols.
    pub entropy_bits: f64,
    /// Everything its coding takes.
    pub bpw: f64,
    /// Number of weights: the area of the mark grows with it.
    pub weights: u64,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 560.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 64.0;
/// Okabe and Ito's palette, told apart by colour-blind readers and on white paper.
const COLORS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"];

/// The SVG text. `title` and `subtitle` are plain text.
pub fn svg(title: &str, subtitle: &str, points: &[Point]) -> String {
    let x_axis = Axis::around(points.iter().map(|point| point.entropy_bits), LEFT, WIDTH - RIGHT);
    let y_axis = Axis::around(points.iter().flat_map(|point| [point.bpw, point.entropy_bits]), HEIGHT - BOTTOM, TOP);
    let mut classes: Vec<&'static str> = Vec::new();
    for point in points {
        if !classes.contains(&point.class) {
            classes.push(point.class);
        }
    }
    let weights_max = points.iter().map(|point| point.weights).max().unwrap_or(1).max(1) as f64;

    let mut out = String::new();
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#222">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{LEFT}" y="28" font-size="17" font-weight="bold">{}</text>
<text x="{LEFT}" y="48" fill="#555">{}</text>"##,
        escape(title),
        escape(subtitle)
    );
    grid(&mut out, &x_axis, &y_axis);
    bound(&mut out, &x_axis, &y_axis);
    // Large marks first, so that small ones stay visible on top of them.
    let mut order: Vec<&Point> = points.iter().collect();
    order.sort_by_key(|point| std::cmp::Reverse(point.weights));
    for point in order {
        let class = classes.iter().position(|&class| class == point.class).unwrap_or(0);
        let radius = 2.5 + 6.5 * (point.weights as f64 / weights_max).sqrt();
        let _ = writeln!(
            out,
            r##"<circle cx="{:.1}" cy="{:.1}" r="{radius:.1}" fill="{}" fill-opacity="0.65" stroke="#fff" stroke-width="0.8"><title>{}: {:.3} bpw, entropy {:.3}</title></circle>"##,
            x_axis.at(point.entropy_bits),
            y_axis.at(point.bpw),
            COLORS[class % COLORS.len()],
            escape(&point.name),
            point.bpw,
            point.entropy_bits
        );
    }
    legend(&mut out, &classes);
    out.push_str("</svg>\n");
    out
}

fn grid(out: &mut String, x_axis: &Axis, y_axis: &Axis) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for value in x_axis.ticks() {
        let x = x_axis.at(value);
        let _ = writeln!(
            out,
            r##"<path d="M{x:.1} {TOP}V{bottom}" stroke="#e4e4e4"/><text x="{x:.1}" y="{}" text-anchor="middle">{}</text>"##,
            bottom + 20.0,
            x_axis.label(value)
        );
    }
    for value in y_axis.ticks() {
        let y = y_axis.at(value);
        let _ = writeln!(
            out,
            r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#e4e4e4"/><text x="{}" y="{:.1}" text-anchor="end">{}</text>"##,
            LEFT - 8.0,
            y + 4.5,
            y_axis.label(value)
        );
    }
    let _ = writeln!(
        out,
        r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>
<text x="{:.1}" y="{}" text-anchor="middle">entropy of the symbols, bits per weight</text>
<text transform="translate(20 {:.1}) rotate(-90)" text-anchor="middle">stored bits per weight, everything counted</text>"##,
        (LEFT + right) / 2.0,
        HEIGHT - 18.0,
        (TOP + bottom) / 2.0
    );
}

/// The line bpw = entropy, clipped to the frame.
fn bound(out: &mut String, x_axis: &Axis, y_axis: &Axis) {
    let (from, to) = (x_axis.low.max(y_axis.low), x_axis.high.min(y_axis.high));
    if from < to {
        let _ = writeln!(
            out,
            r##"<path d="M{:.1} {:.1}L{:.1} {:.1}" stroke="#222" stroke-dasharray="6 4"/>"##,
            x_axis.at(from),
            y_axis.at(from),
            x_axis.at(to),
            y_axis.at(to)
        );
    }
}

fn legend(out: &mut String, classes: &[&str]) {
    let (x, mut y) = (LEFT + 14.0, TOP + 12.0);
    let height = 22.0 * (classes.len() + 1) as f64 + 8.0;
    let _ = writeln!(out, r##"<rect x="{x}" y="{y}" width="200" height="{height}" fill="#fff" fill-opacity="0.9" stroke="#ccc"/>"##);
    y += 18.0;
    for (i, class) in classes.iter().enumerate() {
        let _ = writeln!(
            out,
            r##"<circle cx="{}" cy="{}" r="5.5" fill="{}" fill-opacity="0.65"/><text x="{}" y="{}">{}</text>"##,
            x + 18.0,
            y - 4.0,
            COLORS[i % COLORS.len()],
            x + 36.0,
            y + 0.5,
            escape(class)
        );
        y += 22.0;
    }
    let _ = writeln!(
        out,
        r##"<path d="M{} {}h24" stroke="#222" stroke-dasharray="6 4"/><text x="{}" y="{}">bpw = entropy</text>"##,
        x + 6.0,
        y - 4.0,
        x + 36.0,
        y + 0.5
    );
}

/// A linear axis whose ends are ticks.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
    from_px: f64,
    to_px: f64,
}

impl Axis {
    /// An axis that shows every value with some air, with about six ticks at 1, 2 or 5 times a power of ten.
    fn around(values: impl Iterator<Item = f64>, from_px: f64, to_px: f64) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        let (low, high) = if low > high { (0.0, 1.0) } else { (low, high) };
        let air = ((high - low) * 0.08).max(0.02);
        let (low, high) = ((low - air).max(0.0), high + air);
        let raw = (high - low) / 6.0;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|&step| step >= raw).unwrap_or(raw);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step, from_px, to_px }
    }

    fn at(&self, value: f64) -> f64 {
        self.from_px + (value - self.low) / (self.high - self.low) * (self.to_px - self.from_px)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let count = ((self.high - self.low) / self.step).round() as usize;
        (0..=count).map(|i| self.low + i as f64 * self.step)
    }

    fn label(&self, value: f64) -> String {
        let decimals = (-self.step.log10().floor()).max(0.0) as usize;
        format!("{value:.decimals$}")
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // XML 1.0 has no way to write the other control characters.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(name: &str, entropy_bits: f64, bpw: f64) -> Point {
        Point { name: name.to_owned(), class: "attention", entropy_bits, bpw, weights: 1000 }
    }

    #[test]
    fn every_mark_lies_in_the_frame_and_names_are_escaped() {
        let points = [point("a<b&\u{1}", 2.25, 2.31), point("c", 3.71, 3.75), point("d", 0.0, 0.4)];
        let text = svg("t", "s", &points);
        assert!(text.contains("a&lt;b&amp;\u{fffd}: 2.310 bpw"));
        let marks: Vec<(f64, f64)> = text
            .lines()
            .filter(|line| line.contains("<title>"))
            .map(|line| {
                let value = |key: &str| line.split(key).nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
                (value("cx=\""), value("cy=\""))
            })
            .collect();
        assert_eq!(marks.len(), 3);
        for (x, y) in marks {
            assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y), "{x} {y}");
        }
    }

    #[test]
    fn axes_end_at_ticks_even_without_or_with_equal_values() {
        for values in [vec![], vec![3.0], vec![3.0, 3.0], vec![1.5, 3.8], vec![f64::NAN]] {
            let axis = Axis::around(values.iter().copied(), 0.0, 100.0);
            assert!(axis.low < axis.high && axis.ticks().count() >= 2, "{values:?}");
            assert!((axis.at(axis.ticks().last().unwrap()) - 100.0).abs() < 1e-6);
        }
    }
}
