"""SGLang's radix tree with contexts as sibling paths under their prefix."""
