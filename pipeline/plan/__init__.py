"""What a recipe costs on a machine, and what to do: steps, bytes, seconds, memory. No torch."""
