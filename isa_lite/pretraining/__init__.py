"""How the shipped models came about, and the same for a folder of your own."""
