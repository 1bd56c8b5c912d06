"""What a reply must look like: schemas, expressions and grammars as masks over the next token."""
