//! Numbers as people and models write them.

/// A number found in text. Decimals are compared digit by digit, so that no two long integers are confused; a
/// fraction or a number with an exponent is compared by value, to one part in 10⁹.
#[derive(Debug, Clone)]
pub struct Number {
    value: f64,
    /// Sign and digits without superfluous zeros; `None` for fractions and exponents.
    digits: Option<String>,
}

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        if let (Some(digits), Some(others)) = (&self.digits, &other.digits) {
            return digits == others;
        }
        (self.value - other.value).abs() <= 1e-9 * self.value.abs().max(other.value.abs())
    }
}

impl Number {
    /// The last number of `text`.
    ///
    /// Understood are thousands (`1,234`, `1{,}234`, `1\,234`), a leading `$` and a trailing `%` (both without
    /// meaning), decimals, a trailing full stop, minus signs (`-` and `−`; between two operands one is an operator),
    /// exponents (`1.5e-3`) and fractions (`3/4`, `\frac{3}{4}`).
    #[must_use]
    pub fn last_in(text: &str) -> Option<Self> {
        let text = plain(text);
        let found = Literal::all_in(&text);
        let last = found.last()?;
        let before = found.len().checked_sub(2).map(|at| &found[at]);
        match before {
            Some(above) if above.is_over(last, &text) => above.divided_by(last, &text),
            _ => last.number(),
        }
    }

    /// The number, rounded to the nearest f64.
    #[must_use]
    pub fn value(&self) -> f64 {
        self.value
    }
}

/// `text` without typesetting: one minus sign, one thousands separator, no currency.
fn plain(text: &str) -> String {
    let text = text.replace(['−', '－'], "-").replace("{,}", ",").replace("\\,", "").replace("\\!", "");
    text.replace("\\$", "").replace('$', "")
}

/// A number's place in the text: `text[start..end]`, its sign included.
struct Literal {
    start: usize,
    end: usize,
    negative: bool,
    /// Digits and decimal point, no separators.
    decimal: String,
    /// `e` and what follows, or nothing.
    exponent: String,
}

impl Literal {
    fn all_in(text: &str) -> Vec<Self> {
        let bytes = text.as_bytes();
        let (mut found, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            if !starts_number(bytes, at) {
                at += 1;
                continue;
            }
            let literal = Self::read(text, at);
            at = literal.end;
            found.push(literal);
        }
        found
    }

    /// Reads the number whose first digit or leading point is at `first`.
    fn read(text: &str, first: usize) -> Self {
        let bytes = text.as_bytes();
        let (mut decimal, mut at) = (String::new(), first);
        while let Some(step) = integer_step(bytes, at) {
            decimal.push_str(text[at..at + step].trim_start_matches(','));
            at += step;
        }
        if bytes.get(at) == Some(&b'.') && is_digit(bytes, at + 1) {
            let end = digits_end(bytes, at + 1);
            decimal.push_str(&text[at..end]);
            at = end;
        }
        let end = exponent_end(bytes, at);
        let negative = is_sign(bytes, first);
        let start = first - usize::from(negative);
        Self { start, end, negative, decimal, exponent: text[at..end].into() }
    }

    /// Whether this is the numerator over `below`.
    fn is_over(&self, below: &Self, text: &str) -> bool {
        match &text[self.end..below.start] {
            "/" => true,
            "}{" => text[..self.start].ends_with("frac{"),
            _ => false,
        }
    }

    /// `None` if `below` is zero.
    fn divided_by(&self, below: &Self, text: &str) -> Option<Number> {
        let command = text[..self.start].rfind('\\').filter(|_| text[..self.start].ends_with("frac{"));
        let sign = if command.is_some_and(|command| is_sign(text.as_bytes(), command)) { -1.0 } else { 1.0 };
        let value = sign * self.number()?.value / below.number()?.value;
        value.is_finite().then_some(Number { value, digits: None })
    }

    fn number(&self) -> Option<Number> {
        let sign = if self.negative { "-" } else { "" };
        let value: f64 = format!("{sign}{}{}", self.decimal, self.exponent).parse().ok()?;
        let digits = self.exponent.is_empty().then(|| canonical(sign, &self.decimal));
        value.is_finite().then_some(Number { value, digits })
    }
}

/// Sign and digits of a decimal in the one shortest form.
fn canonical(sign: &str, decimal: &str) -> String {
    let (whole, part) = decimal.split_once('.').unwrap_or((decimal, ""));
    let (whole, part) = (whole.trim_start_matches('0'), part.trim_end_matches('0'));
    if whole.is_empty() && part.is_empty() { "0".into() } else { format!("{sign}{whole}.{part}") }
}

fn is_digit(bytes: &[u8], at: usize) -> bool {
    bytes.get(at).is_some_and(u8::is_ascii_digit)
}

fn digits_end(bytes: &[u8], from: usize) -> usize {
    (from..).find(|&at| !is_digit(bytes, at)).unwrap_or(from)
}

/// A digit, or a point before a digit that does not continue a number (`1.2.3` is 1.2 and 3).
fn starts_number(bytes: &[u8], at: usize) -> bool {
    let is_leading_point = bytes[at] == b'.' && is_digit(bytes, at + 1);
    is_digit(bytes, at) || (is_leading_point && !(at > 0 && is_digit(bytes, at - 1)))
}

/// Length of the next piece of an integer: one digit, or a comma and the three digits it separates.
fn integer_step(bytes: &[u8], at: usize) -> Option<usize> {
    if is_digit(bytes, at) {
        return Some(1);
    }
    let is_separator = bytes.get(at) == Some(&b',') && at > 0 && is_digit(bytes, at - 1);
    (is_separator && digits_end(bytes, at + 1) == at + 4).then_some(4)
}

/// End of an exponent that begins at `at`; `at` if there is none.
fn exponent_end(bytes: &[u8], at: usize) -> usize {
    if !matches!(bytes.get(at), Some(b'e' | b'E')) {
        return at;
    }
    let first = at + 1 + usize::from(matches!(bytes.get(at + 1), Some(b'-' | b'+')));
    if is_digit(bytes, first) { digits_end(bytes, first) } else { at }
}

/// Whether the character before `first` is the number's sign: a minus with no operand on its left.
fn is_sign(bytes: &[u8], first: usize) -> bool {
    if first == 0 || bytes[first - 1] != b'-' {
        return false;
    }
    let left = first.checked_sub(2).map(|at| bytes[at]);
    left.is_none_or(|left| !left.is_ascii_alphanumeric() && !matches!(left, b')' | b']' | b'}' | b'%' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        let check = |text: &str, expected: f64| {
            let found = Number::last_in(text).map(|number| number.value());
            assert_eq!(found, Some(expected), "{text:?}");
        };
        check("42", 42.0);
        check("42.", 42.0);
        check("$42.50", 42.5);
        check(r"\$42.50", 42.5);
        check("-$42", -42.0);
        check("$-42", -42.0);
        check("50%", 50.0);
        check("1,234,567", 1_234_567.0);
        check(r"1{,}234", 1234.0);
        check(r"1,\!234", 1234.0);
        check(r"1\,234", 1234.0);
        check("1, 2, 3", 3.0);
        check("1,23", 23.0);
        check("1,2345", 2345.0);
        check(".5", 0.5);
        check("-.5", -0.5);
        check("1.2.3", 3.0);
        check("10-3", 3.0);
        check("x-3", 3.0);
        check("(4)-3", 3.0);
        check("7 - 3", 3.0);
        check("= -3", -3.0);
        check("=−3", -3.0);
        check("--3", 3.0);
        check("1e3", 1000.0);
        check("1.5e-3", 0.0015);
        check("3e", 3.0);
        check("3/4", 0.75);
        check("-3/4", -0.75);
        check(r"\frac{3}{4}", 0.75);
        check(r"\dfrac{-3}{4}", -0.75);
        check(r"-\frac{3}{4}", -0.75);
        check(r"{3}{4}", 4.0);
        check("10/2=5", 5.0);
        check("ü 7 ü", 7.0);
    }

    #[test]
    fn no_number() {
        for text in ["", " ", "NaN", "inf", "-", ".", "$", "\\boxed{}", "1/0", "1e999"] {
            assert!(Number::last_in(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn equality() {
        let check = |left: &str, right: &str, expected: bool| {
            let is_equal = Number::last_in(left).unwrap() == Number::last_in(right).unwrap();
            assert_eq!(is_equal, expected, "{left} {right}");
        };
        check("7", "7.0", true);
        check("007", "7", true);
        check("-0", "0", true);
        check("1,000", "1000", true);
        check("9007199254740993", "9007199254740992", false);
        check("0.1", "0.10", true);
        check("0.1", "0.100000000001", false);
        check("1/3", "0.333333333333", true);
        check("1/3", "0.3333", false);
        check("1/4", "3/4", false);
        check("1e3", "1000", true);
        check("1000000", "1000001", false);
    }
}
