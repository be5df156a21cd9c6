"""What a method is, and what rules of methods share: scores of single blocks, and ways from an order to a plan."""
