"""One file a command: options, one call, print. Heavy modules are imported inside the command that needs them."""
