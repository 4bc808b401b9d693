"""The zoo's loops against closed forms that know no inner loop, family by family, values and gradients in float64."""
