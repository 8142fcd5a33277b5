"""The optional ffcv: x_0 as a .beton, raw levels read in place, and the guards around both."""
