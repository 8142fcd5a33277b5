"""How values are stored and what they hold: codes and their scales, moments of channels."""
