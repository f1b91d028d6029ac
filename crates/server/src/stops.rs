//! Stop strings: the text before the first of them is the answer.

/// Looks for stop strings in text that comes piece by piece, and holds back what may be the beginning of one.
#[derive(Debug)]
pub(crate) struct Stops {
    stops: Vec<String>,
    held: String,
}

impl Stops {
    /// `stops`: not empty, each of them.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece; returns the text that is certain now, and whether a stop string follows it.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        // The one that is complete first, however the text is cut, though another may have begun before it.
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = found.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let kept = self.stops.iter().map(|stop| beginning_at_end(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, at the end of the text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest beginning of `stop`, shorter than all of it, that `text` ends with.
fn beginning_at_end(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(at, _)| at).rev();
    lengths.into_iter().find(|&length| text.ends_with(&stop[..length])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of `pieces`, joined, and whether they were stopped.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut finder = Stops::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let (certain, stopped) = finder.push(piece);
            text += &certain;
            if stopped {
                return (text, true);
            }
        }
        (text + &finder.finish(), false)
    }

    #[test]
    fn text_ends_before_the_first_stop_string_however_it_is_cut() {
        let text = "über allen Gipfeln ist Ruh";
        for stops in [&["ist", "Gipfel"][..], &["Gipfel"], &["n", " allen Gipfel"]] {
            let (_, first) = stops.iter().filter_map(|stop| text.find(stop).map(|at| (at + stop.len(), at))).min().unwrap();
            let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            for (&one, &two) in places.iter().flat_map(|one| places.iter().map(move |two| (one, two))).filter(|(one, two)| one <= two) {
                assert_eq!(
                    run(stops, &[&text[..one], &text[one..two], &text[two..]]),
                    (text[..first].to_owned(), true),
                    "{stops:?} {one} {two}"
                );
            }
        }
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held_back() {
        let mut finder = Stops::new(vec!["abab!".to_owned()]);
        assert_eq!(finder.push("xaba"), ("x".to_owned(), false));
        assert_eq!(finder.push("bab"), ("ab".to_owned(), false));
        assert_eq!(finder.push("c"), ("ababc".to_owned(), false));
        assert_eq!(finder.finish(), "");
        assert_eq!(run(&[], &["a", "b"]), ("ab".to_owned(), false));
        assert_eq!(run(&["xy"], &["a", "x"]), ("ax".to_owned(), false));
    }
}
