"""Small programs, each run by the tests: `python -m examples.new_learner`."""
