"""What `import strata` gives: features of any module, runs and heads, from Python."""
