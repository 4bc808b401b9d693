"""Refusals with their whole messages: of declarations, of bodies, of layers and of calls."""
