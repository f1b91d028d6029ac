//! Aligned plain-text tables.

/// A table whose columns are as wide as their widest cell. Columns hold text (left) or figures (right).
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

struct Column {
    title: String,
    right: bool,
}

impl Table {
    /// Columns by title; a title that begins with `>` is right-aligned.
    pub fn new(titles: &[&str]) -> Self {
        let column = |title: &&str| match title.strip_prefix('>') {
            Some(rest) => Column { title: rest.to_owned(), right: true },
            None => Column { title: (*title).to_owned(), right: false },
        };
        Self { columns: titles.iter().map(column).collect(), rows: Vec::new() }
    }

    /// Adds a row; it must have a cell for every column.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        assert_eq!(cells.len(), self.columns.len(), "a row needs a cell for every column");
        self.rows.push(cells);
    }

    /// The text: a line of titles (unless all are empty) and a line for every row, two blanks between columns, none at the end of a line.
    pub fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| {
                let cells = self.rows.iter().map(|row| width(&row[i]));
                cells.chain([width(&self.columns[i].title)]).max().unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        let titles: Vec<String> = self.columns.iter().map(|column| column.title.clone()).collect();
        if titles.iter().any(|title| !title.is_empty()) {
            self.line(&mut text, &titles, &widths);
        }
        for row in &self.rows {
            self.line(&mut text, row, &widths);
        }
        text
    }

    fn line(&self, text: &mut String, cells: &[String], widths: &[usize]) {
        let mut line = String::new();
        for ((cell, column), &room) in cells.iter().zip(&self.columns).zip(widths) {
            let blanks = " ".repeat(room - width(cell));
            if !line.is_empty() {
                line.push_str("  ");
            }
            if column.right {
                line.push_str(&blanks);
                line.push_str(cell);
            } else {
                line.push_str(cell);
                line.push_str(&blanks);
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn columns_align_and_lines_end_without_blanks() {
        let mut table = Table::new(&["tensor", ">bpw", "codec"]);
        table.row(["a".into(), "3.75".into(), "rans".into()]);
        table.row(["long.name".into(), "12.00".into(), "x".into()]);
        assert_eq!(table.render(), "tensor       bpw  codec\na           3.75  rans\nlong.name  12.00  x\n");
    }
}
