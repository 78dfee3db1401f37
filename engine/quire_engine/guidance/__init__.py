"""What an output has to look like, as masks over the tokens that may be drawn next.

`spec` is the description, which travels with a request; `structure` and `grammars` write it; `vocabulary`, `compiled`
and `cursor` turn it into masks where tokens are drawn; `rows` does so for the rows of a step.
"""
