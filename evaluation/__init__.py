"""Measure an erasure: generate with and without the adapter, judge the pictures, write report.json and its page."""
