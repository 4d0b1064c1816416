"""Many runs side by side: their settings, results, table and chart."""
