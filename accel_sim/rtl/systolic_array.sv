// ROWS x COLUMNS processing elements with the registers that skew what enters and straighten what leaves.
//
// A word of lane r on the left reaches row r after r cycles, one of lane c on the top column c after c cycles; the
// flags travel with the words of the left. `shift` has one wire per row and is not skewed: row r of column c sees it c
// cycles later. What leaves the bottom in column c waits COLUMNS - 1 - c cycles, so that a row of results is whole.
module systolic_array #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter DATA_BITS = 8,
    parameter ACCUMULATOR_BITS = 32,
    parameter OUTPUT_STATIONARY = 0,
    parameter WEIGHT_SHADOW = 1,
    parameter DRAIN_OVERLAP = 1
) (
    input  logic                                clk,
    input  logic                                reset,
    input  logic [          ROWS*DATA_BITS-1:0] left,
    input  logic                                first,
    input  logic                                last,
    input  logic [                    ROWS-1:0] shift,
    input  logic [       COLUMNS*DATA_BITS-1:0] top,
    output logic [COLUMNS*ACCUMULATOR_BITS-1:0] bottom
);
  localparam LANE = DATA_BITS + 2;  // a word and its two flags

  logic [ROWS*LANE-1:0] left_aligned;
  wire [ROWS*LANE-1:0] left_skewed;
  wire [COLUMNS*DATA_BITS-1:0] top_skewed;
  wire [COLUMNS*ACCUMULATOR_BITS-1:0] bottom_skewed;

  // what row r, column c passes on: to the right in across[r][c + 1], down in down[r + 1][c]
  wire signed [DATA_BITS-1:0] across[0:ROWS*(COLUMNS+1)-1];
  wire [2:0] flags[0:ROWS*(COLUMNS+1)-1];
  wire signed [DATA_BITS-1:0] down[0:(ROWS+1)*COLUMNS-1];
  wire signed [ACCUMULATOR_BITS-1:0] sum[0:(ROWS+1)*COLUMNS-1];

  skew #(
      .LANES(ROWS),
      .BITS (LANE)
  ) skew_left (
      .clk  (clk),
      .reset(reset),
      .in   (left_aligned),
      .out  (left_skewed)
  );
  skew #(
      .LANES(COLUMNS),
      .BITS (DATA_BITS)
  ) skew_top (
      .clk  (clk),
      .reset(reset),
      .in   (top),
      .out  (top_skewed)
  );
  skew #(
      .LANES(COLUMNS),
      .BITS(ACCUMULATOR_BITS),
      .REVERSED(1)
  ) straighten_bottom (
      .clk  (clk),
      .reset(reset),
      .in   (bottom_skewed),
      .out  (bottom)
  );

  genvar r, c;
  generate
    for (r = 0; r < ROWS; r = r + 1) begin : row
      assign left_aligned[r*LANE+:LANE] = {last, first, left[r*DATA_BITS+:DATA_BITS]};
      assign across[r*(COLUMNS+1)] = left_skewed[r*LANE+:DATA_BITS];
      assign flags[r*(COLUMNS+1)] = {shift[r], left_skewed[r*LANE+DATA_BITS+:2]};
      for (c = 0; c < COLUMNS; c = c + 1) begin : column
        processing_element #(
            .OUTPUT_STATIONARY(OUTPUT_STATIONARY),
            .WEIGHT_SHADOW(WEIGHT_SHADOW),
            .DRAIN_OVERLAP(DRAIN_OVERLAP),
            .DATA_BITS(DATA_BITS),
            .ACCUMULATOR_BITS(ACCUMULATOR_BITS)
        ) element (
            .clk(clk),
            .reset(reset),
            .across_in(across[r*(COLUMNS+1)+c]),
            .first_in(flags[r*(COLUMNS+1)+c][0]),
            .last_in(flags[r*(COLUMNS+1)+c][1]),
            .shift_in(flags[r*(COLUMNS+1)+c][2]),
            .across_out(across[r*(COLUMNS+1)+c+1]),
            .first_out(flags[r*(COLUMNS+1)+c+1][0]),
            .last_out(flags[r*(COLUMNS+1)+c+1][1]),
            .shift_out(flags[r*(COLUMNS+1)+c+1][2]),
            .down_in(down[r*COLUMNS+c]),
            .sum_in(sum[r*COLUMNS+c]),
            .down_out(down[(r+1)*COLUMNS+c]),
            .sum_out(sum[(r+1)*COLUMNS+c])
        );
      end
    end
    for (c = 0; c < COLUMNS; c = c + 1) begin : edge_of
      assign down[c] = top_skewed[c*DATA_BITS+:DATA_BITS];
      assign sum[c] = {ACCUMULATOR_BITS{1'b0}};
      assign bottom_skewed[c*ACCUMULATOR_BITS+:ACCUMULATOR_BITS] = sum[ROWS*COLUMNS+c];
    end
  endgenerate
endmodule
