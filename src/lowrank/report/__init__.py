"""Tables, curves and pages of finished runs, and the comparison that makes them."""
