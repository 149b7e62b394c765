// The array with its sequencer: one M x K x N product after another, all folds of it, edge folds padded with zeros.
//
// Operands are read from two memories outside, in the cycle in which their address is given:
//     left   ROWS lanes.    Weight-stationary: word f M + i holds a[i, f ROWS ..]; output-stationary: word f K + i
//                           holds a[f ROWS .., i]
//     top    COLUMNS lanes. Word f K + i holds b[i, f COLUMNS ..]
// Results go to accumulators outside, a row of COLUMNS a cycle: word f M + i is c[i, f COLUMNS ..]; with
// `write_accumulate` it is added to what is there. Lanes beyond the product's edge may hold anything on the way in.
//
// `start` in the cycle in which the first word enters, `done` in the one in which the last result is written.
module gemm_unit #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter DATA_BITS = 8,
    parameter ACCUMULATOR_BITS = 32,
    parameter OUTPUT_STATIONARY = 0,
    parameter WEIGHT_SHADOW = 1,
    parameter DRAIN_OVERLAP = 1,
    parameter DIM_BITS = 16,
    parameter ADDRESS_BITS = 20
) (
    input  logic                                clk,
    input  logic                                reset,
    input  logic                                start,
    input  logic [                DIM_BITS-1:0] m,
    input  logic [                DIM_BITS-1:0] k,
    input  logic [                DIM_BITS-1:0] n,
    output logic [            ADDRESS_BITS-1:0] left_address,
    input  logic [          ROWS*DATA_BITS-1:0] left_word,
    output logic [            ADDRESS_BITS-1:0] top_address,
    input  logic [       COLUMNS*DATA_BITS-1:0] top_word,
    output logic                                write_valid,
    output logic                                write_accumulate,
    output logic [            ADDRESS_BITS-1:0] write_address,
    output logic [COLUMNS*ACCUMULATOR_BITS-1:0] write_word,
    output logic                                done
);
  wire left_valid, top_valid, first, last, fold_written;
  wire [DIM_BITS-1:0] left_lanes, top_lanes;
  wire [ROWS-1:0] shift;
  wire result_valid, result_accumulate, result_ends_fold, result_ends_all;
  wire [ADDRESS_BITS-1:0] result_address;

  generate
    if (OUTPUT_STATIONARY != 0) begin : output_stationary
      output_sequencer #(
          .ROWS(ROWS),
          .COLUMNS(COLUMNS),
          .DRAIN_OVERLAP(DRAIN_OVERLAP),
          .DIM_BITS(DIM_BITS),
          .ADDRESS_BITS(ADDRESS_BITS)
      ) sequencer (
          .*
      );
    end else begin : weight_stationary
      weight_sequencer #(
          .ROWS(ROWS),
          .COLUMNS(COLUMNS),
          .WEIGHT_SHADOW(WEIGHT_SHADOW),
          .DIM_BITS(DIM_BITS),
          .ADDRESS_BITS(ADDRESS_BITS)
      ) sequencer (
          .*
      );
    end
  endgenerate

  // zeros instead of what lies beyond the edge
  wire [ROWS*DATA_BITS-1:0] left;
  wire [COLUMNS*DATA_BITS-1:0] top;
  genvar i;
  generate
    for (i = 0; i < ROWS; i = i + 1) begin : left_lane
      localparam [DIM_BITS-1:0] LANE = i[DIM_BITS-1:0];
      assign left[i*DATA_BITS+:DATA_BITS] =
          left_valid && LANE < left_lanes ? left_word[i*DATA_BITS+:DATA_BITS] : {DATA_BITS{1'b0}};
    end
    for (i = 0; i < COLUMNS; i = i + 1) begin : top_lane
      localparam [DIM_BITS-1:0] LANE = i[DIM_BITS-1:0];
      assign top[i*DATA_BITS+:DATA_BITS] =
          top_valid && LANE < top_lanes ? top_word[i*DATA_BITS+:DATA_BITS] : {DATA_BITS{1'b0}};
    end
  endgenerate

  systolic_array #(
      .ROWS(ROWS),
      .COLUMNS(COLUMNS),
      .DATA_BITS(DATA_BITS),
      .ACCUMULATOR_BITS(ACCUMULATOR_BITS),
      .OUTPUT_STATIONARY(OUTPUT_STATIONARY),
      .WEIGHT_SHADOW(WEIGHT_SHADOW),
      .DRAIN_OVERLAP(DRAIN_OVERLAP)
  ) elements (
      .clk(clk),
      .reset(reset),
      .left(left),
      .first(first),
      .last(last),
      .shift(shift),
      .top(top),
      .bottom(write_word)
  );

  // What is written where travels beside the results: down ROWS elements (where operands are meant; a drain's rows are
  // at the bottom already), then as long as the last column's take.
  delay #(
      .BITS (4 + ADDRESS_BITS),
      .DEPTH(COLUMNS - 1 + (OUTPUT_STATIONARY != 0 ? 0 : ROWS))
  ) beside_results (
      .clk  (clk),
      .reset(reset),
      .in   ({result_valid, result_accumulate, result_ends_fold, result_ends_all, result_address}),
      .out  ({write_valid, write_accumulate, fold_written, done, write_address})
  );
endmodule
