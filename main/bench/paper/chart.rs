//! Charts as SVG.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::commands::Result;
use crate::failure::Failure;

const SIZE: (u32, u32) = (760, 440);
const FONT: &str = "sans-serif";
const COLORS: [RGBColor; 3] = [RGBColor(31, 90, 160), RGBColor(200, 80, 30), RGBColor(40, 130, 70)];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawing = std::result::Result<(), Box<dyn std::error::Error>>;

/// Points that belong together, in order.
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// Lines over numbers, and places on the x-axis that stand out.
pub(super) struct Lines<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) lines: &'a [Line],
    pub(super) marks: &'a [(f64, &'a str)],
}

/// Cells with a value, which is their colour, and a text; row by row.
pub(super) struct Heat<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    pub(super) columns: &'a [usize],
    pub(super) rows: &'a [usize],
    pub(super) cells: Vec<(f64, String)>,
}

impl Lines<'_> {
    pub(super) fn draw(&self) -> Result<String> {
        svg(|area| {
            let points = || self.lines.iter().flat_map(|line| &line.points);
            let (width, top) = points().fold((0.0, 0.0), |(x, y): (f64, f64), p| (p.0.max(x), p.1.max(y)));
            let (width, height) = (width.max(1e-9), top.max(1e-9) * 1.08);
            let mut chart = ChartBuilder::on(area)
                .caption(self.title, (FONT, 17))
                .margin(14)
                .x_label_area_size(42)
                .y_label_area_size(58)
                .build_cartesian_2d(0.0..width, 0.0..height)?;
            let mut mesh = chart.configure_mesh();
            mesh.x_desc(self.x).y_desc(self.y).light_line_style(WHITE).label_style((FONT, 13));
            mesh.x_label_formatter(&short).y_label_formatter(&short).draw()?;
            for (line, color) in self.lines.iter().zip(COLORS.iter().cycle()) {
                let series = LineSeries::new(line.points.iter().copied(), color.stroke_width(2));
                chart
                    .draw_series(series)?
                    .label(&line.name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
            }
            for (x, name) in self.marks {
                let line = [(*x, 0.0), (*x, height)];
                chart.draw_series([PathElement::new(line, BLACK.mix(0.5))])?;
                let place = (*x + width * 0.01, height * 0.6);
                chart.draw_series([Text::new((*name).to_owned(), place, (FONT, 13))])?;
            }
            let mut legend = chart.configure_series_labels();
            legend.position(SeriesLabelPosition::UpperRight).background_style(WHITE.mix(0.8));
            legend.label_font((FONT, 13)).border_style(BLACK.mix(0.3)).draw()?;
            Ok(())
        })
    }
}

impl Heat<'_> {
    pub(super) fn draw(&self) -> Result<String> {
        svg(|area| {
            let (columns, rows) = (self.columns.len(), self.rows.len());
            let mut chart = ChartBuilder::on(area)
                .caption(self.title, (FONT, 17))
                .margin(14)
                .x_label_area_size(42)
                .y_label_area_size(58)
                .build_cartesian_2d(0.0..columns as f64, 0.0..rows as f64)?;
            let at = |names: &[usize], x: f64| {
                let is_middle = (x.fract() - 0.5).abs() < 1e-6;
                names.get(x as usize).filter(|_| is_middle).map(usize::to_string).unwrap_or_default()
            };
            let (across, down) = (|x: &f64| at(self.columns, *x), |y: &f64| at(self.rows, *y));
            let mut mesh = chart.configure_mesh();
            mesh.disable_mesh().x_desc(self.x).y_desc(self.y).label_style((FONT, 13));
            mesh.x_labels(2 * columns + 1).y_labels(2 * rows + 1);
            mesh.x_label_formatter(&across).y_label_formatter(&down).draw()?;
            for (i, (value, text)) in self.cells.iter().enumerate() {
                let (x, y) = ((i % columns) as f64, (i / columns) as f64);
                let cell = [(x, y), (x + 1.0, y + 1.0)];
                chart.draw_series([Rectangle::new(cell, shade(*value).filled())])?;
                chart.draw_series([Text::new(text.clone(), (x + 0.14, y + 0.55), (FONT, 13))])?;
            }
            Ok(())
        })
    }
}

/// Without a fraction that says nothing.
fn short(number: &f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Blue where it is faster than 1, red where it is slower, white between; full at twice and half.
fn shade(value: f64) -> RGBColor {
    let strength = value.max(1e-9).log2().clamp(-1.0, 1.0);
    let pale = |full: u8| (255.0 - strength.abs() * f64::from(255 - full)) as u8;
    let RGBColor(r, g, b) = if strength > 0.0 { RGBColor(110, 170, 235) } else { RGBColor(240, 130, 100) };
    RGBColor(pale(r), pale(g), pale(b))
}

fn svg(draw: impl FnOnce(&Area<'_>) -> Drawing) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        let drawn = area.fill(&WHITE).map_err(Into::into).and_then(|()| draw(&area));
        drawn.and_then(|()| area.present().map_err(Into::into)).map_err(|e| Failure::Chart(e.to_string()))?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charts_hold_their_texts() {
        let line = |name: &str, points: &[(f64, f64)]| Line { name: name.into(), points: points.to_vec() };
        let lines = [line("one", &[(0.0, 1.0), (2.0, 3.0)]), line("none", &[])];
        let chart = Lines { title: "A title", x: "across", y: "up", lines: &lines, marks: &[(1.0, "here")] };
        let text = chart.draw().unwrap();
        assert!(["A title", "across", "up", "one", "here"].iter().all(|word| text.contains(word)), "{text}");
        let empty = Lines { title: "nothing", x: "x", y: "y", lines: &[], marks: &[] };
        assert!(empty.draw().unwrap().contains("nothing"));
        let cells = vec![(2.0, "2.00x".to_owned()), (0.5, "0.50x".to_owned())];
        let heat = Heat { title: "t", x: "x", y: "y", columns: &[8, 16], rows: &[3], cells };
        let text = heat.draw().unwrap();
        assert!(["2.00x", "0.50x", ">\n16\n<", "#6EAAEB", "#F08264"].iter().all(|word| text.contains(word)), "{text}");
    }
}
