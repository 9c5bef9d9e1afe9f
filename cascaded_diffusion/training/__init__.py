"""Training one stage: state, optimizer, step, loop."""
