"""Where entries go: `base` has the protocol, `isolation` keeps sinks apart; each destination is a module of its own."""
