//! Tables of text with aligned columns.

/// Rows of cells. The first column is aligned to the left.
pub struct Columns {
    rows: Vec<Vec<String>>,
    rest_to_the_right: bool,
}

impl Columns {
    /// A table of figures, aligned to the right under the names of their columns.
    pub fn new<const N: usize>(names: [&str; N]) -> Self {
        Self { rows: vec![names.map(str::to_owned).into()], rest_to_the_right: true }
    }

    /// A list of things with their names.
    pub fn list() -> Self {
        Self { rows: Vec::new(), rest_to_the_right: false }
    }

    /// Adds a row.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// Adds a name with its text.
    pub fn named(&mut self, name: &str, text: String) {
        self.row([name.to_owned(), text]);
    }

    /// The lines, each begun with two spaces but for that with the names of columns.
    pub fn lines(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let widths: Vec<usize> = (0..columns)
            .map(|column| cells(column).map(|cell| cell.chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for (number, row) in self.rows.iter().enumerate() {
            let heads = number == 0 && self.rest_to_the_right;
            let mut line = String::new();
            for (index, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                let outdent = if heads && index == 0 { 2 } else { 0 };
                let padding = " ".repeat(width - cell.chars().count() + outdent);
                line.push_str(&"  "[outdent..]);
                if index > 0 && self.rest_to_the_right {
                    line.push_str(&padding);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&padding);
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_space() {
        let mut columns = Columns::new(["class", "used"]);
        columns.row(["64 B".into(), "1,234,567".into()]);
        columns.row(["grün".into(), String::new()]);
        assert_eq!(columns.lines(), "class         used\n  64 B   1,234,567\n  grün\n");
        let mut list = Columns::list();
        list.named("a", "first".into());
        list.named("longer", "x".into());
        assert_eq!(list.lines(), "  a       first\n  longer  x\n");
    }
}
