"""The commands of `glmix`: plain functions, whose options come from their signatures."""
