"""Streams: the step of a loop that reads out while it learns, in the form that costs least.

A chunk of n tokens is one tile. Gradients are taken at the weights W_0 the chunk starts with (the anchor); an optimizer
that is linear in them reads token t with

    W_t = beta_t W_0 - sum_o f_t,o S_o - sum_{s <= t} C[t, s] G_s            (S_o: the momenta)

so it appears only in the coefficients C, beta and f (`coefficients`). G_s is u_s^T delta_s wherever a fast weight
enters through a product, so W_t is never built (`dual`); where it enters otherwise, it is (`primal`). Gradients at the
current weights are a triangular system where delta is affine in the learner's output (`solved`).
"""
