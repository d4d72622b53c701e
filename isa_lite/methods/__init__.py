"""Other ways to compose a query, for comparison: baselines, ceilings, late fusion, one word."""
