"""Many runs: ablations, comparisons, growth, failures, cards."""
