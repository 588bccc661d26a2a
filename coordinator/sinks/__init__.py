"""Where entries go: `base` holds the protocol and the isolation; every destination is a module, imported when named."""
