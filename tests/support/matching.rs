//! Assigns claims to sources: as many as possible, in any order.

use std::collections::HashMap;
use std::hash::Hash;

/// Returns for each claim whether one of the sources that it names can meet it. Each source meets at most
/// as many claims as `most` says. The first choices of a claim are tried first; an earlier claim moves to
/// another source if that helps (augmenting paths, Kuhn's method).
pub fn met<K: Copy + Eq + Hash>(claims: &[Vec<K>], most: &HashMap<K, usize>) -> Vec<bool> {
    let mut held: HashMap<K, Vec<usize>> = HashMap::new();
    let met = (0..claims.len()).map(|claim| {
        let mut tried = Vec::new();
        place(claim, claims, most, &mut held, &mut tried)
    });
    met.collect()
}

fn place<K: Copy + Eq + Hash>(
    claim: usize,
    claims: &[Vec<K>],
    most: &HashMap<K, usize>,
    held: &mut HashMap<K, Vec<usize>>,
    tried: &mut Vec<K>,
) -> bool {
    for &source in &claims[claim] {
        if tried.contains(&source) {
            continue;
        }
        tried.push(source);
        let holders = held.entry(source).or_default();
        if holders.len() < most.get(&source).copied().unwrap_or(0) {
            holders.push(claim);
            return true;
        }
        for (index, other) in holders.clone().into_iter().enumerate() {
            if place(other, claims, most, held, tried) {
                held.entry(source).or_default()[index] = claim;
                return true;
            }
        }
    }
    false
}

#[test]
fn who_has_a_choice_leaves_the_place_to_who_has_none() {
    let most = HashMap::from([('a', 1), ('b', 2), ('c', 0)]);
    let claims = [vec!['a', 'b'], vec!['a'], vec!['b', 'a'], vec!['c']];
    assert_eq!(met(&claims, &most), [true, true, true, false]);
    let claims = [vec!['a'], vec!['a'], vec!['b'], vec!['b'], vec!['b', 'a']];
    assert_eq!(met(&claims, &most), [true, false, true, true, false]);
}
