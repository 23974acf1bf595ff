use super::*;

fn cycle(requests: usize, prefilled: usize) -> CycleStats {
    CycleStats { requests, rows: requests + prefilled, prefilled, ..CycleStats::default() }
}

#[test]
fn forwards_of_prompts_alone_are_not_counted() {
    let cycles = vec![cycle(0, 64), cycle(0, 7), cycle(1, 0), cycle(1, 9), cycle(2, 0)];
    let decoded = Decoded { cycles, ..Decoded::default() };
    assert_eq!(decoded.forwards(), 3);
}
