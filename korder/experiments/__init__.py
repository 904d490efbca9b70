"""Runs what a run file describes: builds the data, computes, checks, and writes results whole or not at all."""
