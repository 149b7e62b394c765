// One multiply-accumulate element.
//
// Weight-stationary: operands and their flags pass to the right, partial sums and new weights pass down. `shift` moves
// the column's chain of weights down by one. With WEIGHT_SHADOW the chain is beside the weight in use, which an operand
// flagged `first` replaces by the chain's; without, the chain holds the weight in use.
//
// Output-stationary: one operand passes to the right, one down; the sum stays. `first` begins a new sum, `last` ends it.
// `shift` moves the column's results down by one. With DRAIN_OVERLAP they leave in registers beside the sums; without,
// the sums themselves are shifted.
module processing_element #(
    parameter OUTPUT_STATIONARY = 0,
    parameter WEIGHT_SHADOW = 1,
    parameter DRAIN_OVERLAP = 1,
    parameter DATA_BITS = 8,
    parameter ACCUMULATOR_BITS = 32
) (
    input  logic                               clk,
    input  logic                               reset,
    // from the left neighbour, to the right one
    input  logic signed [       DATA_BITS-1:0] across_in,
    input  logic                               first_in,
    input  logic                               last_in,
    input  logic                               shift_in,
    output logic signed [       DATA_BITS-1:0] across_out,
    output logic                               first_out,
    output logic                               last_out,
    output logic                               shift_out,
    // from the upper neighbour, to the lower one
    input  logic signed [       DATA_BITS-1:0] down_in,
    input  logic signed [ACCUMULATOR_BITS-1:0] sum_in,
    output logic signed [       DATA_BITS-1:0] down_out,
    output logic signed [ACCUMULATOR_BITS-1:0] sum_out
);
  /* verilator no_inline_module */
  always_ff @(posedge clk) begin
    across_out <= across_in;
    first_out  <= first_in && !reset;
    last_out   <= last_in && !reset;
    shift_out  <= shift_in && !reset;
  end

  generate
    if (OUTPUT_STATIONARY != 0) begin : output_stationary
      logic signed [ACCUMULATOR_BITS-1:0] total;
      wire signed [ACCUMULATOR_BITS-1:0] product = across_in * down_in;
      wire signed [ACCUMULATOR_BITS-1:0] next = first_in ? product : total + product;
      always_ff @(posedge clk) down_out <= down_in;
      if (DRAIN_OVERLAP != 0) begin : beside
        logic signed [ACCUMULATOR_BITS-1:0] leaving;
        always_ff @(posedge clk) begin
          total <= next;
          if (last_in) leaving <= next;
          else if (shift_in) leaving <= sum_in;
        end
        assign sum_out = leaving;
      end else begin : in_turn
        always_ff @(posedge clk) total <= shift_in ? sum_in : next;
        assign sum_out = total;
      end
    end else begin : weight_stationary
      logic signed [DATA_BITS-1:0] chain;
      wire signed [DATA_BITS-1:0] weight;
      wire signed [ACCUMULATOR_BITS-1:0] product = across_in * weight;
      always_ff @(posedge clk) begin
        if (shift_in) chain <= down_in;
        sum_out <= sum_in + product;
      end
      assign down_out = chain;
      if (WEIGHT_SHADOW != 0) begin : beside
        logic signed [DATA_BITS-1:0] active;
        assign weight = first_in ? chain : active;
        always_ff @(posedge clk) active <= weight;
      end else begin : in_turn
        assign weight = chain;
      end
    end
  endgenerate
endmodule
