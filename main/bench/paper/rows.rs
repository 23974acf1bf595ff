//! A figure's numbers for machines: the cells of its CSV, by the names of their columns.

use std::collections::BTreeMap;

use serde_json::Value;

/// Cells by column.
pub(super) type Row = BTreeMap<String, Value>;

/// The rows below the head of a CSV without quotes. What reads as a number is one.
pub(super) fn rows(csv: &str) -> Vec<Row> {
    let mut lines = csv.lines();
    let columns: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    let cell = |(column, text): (&&str, &str)| ((*column).to_owned(), value(text));
    lines.map(|line| columns.iter().zip(line.split(',')).map(cell).collect()).collect()
}

fn value(text: &str) -> Value {
    let whole = text.parse::<u64>().ok().map(Value::from);
    whole.or_else(|| text.parse::<f64>().ok().map(Value::from)).unwrap_or_else(|| text.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_are_those_of_the_csv() {
        let found = rows("way,seconds,running\nplain,0.250000,3\nadaptive,1.500000,0\n");
        let wanted = json!([
            {"way": "plain", "seconds": 0.25, "running": 3},
            {"way": "adaptive", "seconds": 1.5, "running": 0},
        ]);
        assert_eq!(serde_json::to_value(found).unwrap(), wanted);
        assert!(rows("level,chance\n").is_empty() && rows("").is_empty());
    }
}
