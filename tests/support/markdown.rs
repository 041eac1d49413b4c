//! Extracts fenced blocks from a Markdown document, for tests that run the commands of a page.

#[derive(Debug, PartialEq)]
pub struct Block {
    /// The language behind the fence: `sh`, `python`, `text`.
    pub language: String,
    /// Its lines, each with its newline.
    pub text: String,
    /// The heading above it.
    pub section: String,
    /// The number of its first line, from 1.
    pub line: usize,
}

/// Returns all blocks of a document, in order.
pub fn blocks(document: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    let mut section = String::new();
    for (index, line) in document.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, Some(language)) => {
                open = Some(Block {
                    language: language.trim().to_owned(),
                    text: String::new(),
                    section: section.clone(),
                    line: index + 1,
                });
            }
            (None, None) => {
                if let Some(heading) = line.strip_prefix('#') {
                    section = heading.trim_start_matches('#').trim().to_owned();
                }
            }
        }
    }
    assert!(open.is_none(), "a block without an end: {open:?}");
    blocks
}

#[test]
fn blocks_carry_their_language_and_section() {
    let found = blocks("# A\n```sh\nls\n# no heading\n```\n## B\n```text\nx\n```\n");
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].text, "ls\n# no heading\n");
    assert_eq!((found[0].section.as_str(), found[0].line), ("A", 2));
    assert_eq!(
        (found[1].section.as_str(), found[1].language.as_str()),
        ("B", "text")
    );
}
