"""The search for the plan of a request: settings, cuts and policies that fit limits, the best of them."""
