"""From a search space to a network: operations, architectures, decoding, cost, drawings."""
